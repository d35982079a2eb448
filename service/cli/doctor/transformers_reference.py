"""What transformers says of an engine's answers, by the same weights in float32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from service.cli.doctor.greedy_answers import GreedyAnswer, ReferenceScores


def reference_scores(
    folder: Path, prompts: Sequence[Sequence[int]], answers: Sequence[GreedyAnswer]
) -> list[ReferenceScores]:
    """Score the tokens of each answer.

    Args:
        folder: The model's folder.
        prompts: Token ids of the prompts.
        answers: The answer to each prompt.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    ).eval()
    found = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = torch.tensor([[*prompt, *answer.tokens[:-1]]])
            logits = model(whole, use_cache=False).logits[0, len(prompt) - 1 :]
            logprobs = torch.log_softmax(logits.double(), dim=-1)
            rows = range(len(answer.tokens))
            best = logprobs.topk(2, dim=-1).values
            found.append(
                ReferenceScores(
                    tuple(logprobs[rows, list(answer.tokens)].tolist()),
                    tuple(best[:, 0].tolist()),
                    tuple((best[:, 0] - best[:, 1]).tolist()),
                )
            )
    return found
