"""The reference judges greedy answers of random models, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli.doctor.engine_trials import prompts
from service.cli.doctor.greedy_answers import GreedyAnswer, are_alike, judge_answers
from service.cli.doctor.random_models import LLAMA, SMALL, small_config, write_random_model
from service.cli.doctor.transformers_reference import reference_scores

pytestmark = pytest.mark.filterwarnings("ignore")
_TOKENS = 5


def greedy_answers(folder: Path) -> list[GreedyAnswer]:
    """Generate with transformers in bfloat16, as an engine might."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    answers = []
    with torch.inference_mode():
        for prompt in prompts():
            tokens, logprobs = [], []
            for _ in range(_TOKENS):
                logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
                tokens.append(int(logits.argmax()))
                logprobs.append(float(torch.log_softmax(logits, -1)[tokens[-1]]))
            answers.append(GreedyAnswer(tuple(tokens), tuple(logprobs)))
    return answers


def test_reference_accepts_a_model_s_own_answers_and_no_other_s(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    said = {}
    for seed, name in enumerate(("one", "two")):
        write_random_model(tmp_path / name, small_config(LLAMA, SMALL), "bfloat16", seed)
        said[name] = greedy_answers(tmp_path / name)
    assert not are_alike(said["one"], said["two"])

    def fault(one: list[GreedyAnswer], two: list[GreedyAnswer]) -> str | None:
        times = {"one": [one, one], "two": [two, two]}
        scores = {
            name: reference_scores(tmp_path / name, prompts(), answers[0])
            for name, answers in times.items()
        }
        return judge_answers(times, scores, {}, "bfloat16")

    assert fault(said["one"], said["two"]) is None
    found = fault(said["two"], said["one"])
    assert found is not None
    assert found.startswith("model one, prompt 0: against transformers")
