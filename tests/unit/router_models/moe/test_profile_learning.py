"""`coe moe profile`: a profile learned, judged and written; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from router_models.demo.prompt_templates import templated
from router_models.moe.profile_evaluation import distinct
from router_models.moe.profile_text_reader import ProfileError, read_texts
from service.cli.moe import moe
from service.errors import CoeError
from service.moe.steering_profile import check_profile, moe_shape, read_profile
from tests.support.tiny_moe import EXPERTS, LAYERS, TOP_K, save, tiny_moe


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_moe("mixtral"), tmp_path_factory.mktemp("moe") / "mixtral")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "math.txt"
    path.write_text("\n".join([*templated("math", 16, 0), "", *templated("math", 4, 0)]))
    return path


def run(*words: object) -> Result:
    result = CliRunner().invoke(moe, ["profile", *map(str, words)])
    if isinstance(result.exception, CoeError):
        return result
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def refused(*words: object) -> str:
    result = run(*words)
    assert isinstance(result.exception, CoeError), result.output
    return result.exception.message


def bits_by_hand(base: Path, words: str, masks: dict[int, np.ndarray]) -> float:
    """Bits of a text, with what is masked taken out of the gates' own weights."""
    model = tiny_moe("mixtral")
    for i, layer in enumerate(model.model.layers):
        gate, mask = layer.mlp.gate, masks[i]

        def route(x: torch.Tensor, gate: Any = gate, mask: Any = mask) -> Any:
            logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), gate.weight)
            odds = logits.masked_fill(torch.from_numpy(mask), -math.inf).softmax(-1)
            weights, ids = odds.topk(TOP_K)
            return logits, weights / weights.sum(-1, keepdim=True), ids

        gate.forward = route
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(base)(words)["input_ids"]
    with torch.no_grad():
        odds = model(input_ids=torch.tensor([[256, *ids]])).logits[0].log_softmax(-1)
    return -sum(float(odds[i, token]) for i, token in enumerate(ids)) / math.log(2)


def test_profile_command_learns_evaluates_and_writes(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "math.safetensors"
    others = tmp_path / "others.jsonl"
    others.write_text('{"text": "def f(x):"}\n{"prompt": "import os", "answer": "os.sep"}\n')
    result = run(
        *("--model", base, "--prompts", prompts, "--out", out, "--keep", 0.5),
        *("--others", others, "--protect", "1:3", "--json"),
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    profile, shape = read_profile(out), moe_shape(base)
    assert shape is not None
    check_profile(profile, shape)
    masks = {i: layer.mask for i, layer in profile.layers.items()}
    assert [int((~masks[i]).sum()) for i in range(LAYERS)] == [EXPERTS // 2] * LAYERS
    assert profile.protected == {1: (3,)}
    assert not masks[1][3]
    assert data["kept"] == EXPERTS // 2
    assert data["protected"] == {"1": [3]}
    assert 0.5 < data["importance_kept_least"] <= data["importance_kept"] <= 1
    # One text in four of the sixteen is held out; those given twice count once.
    assert (data["learned_texts"], data["domain"]["texts"], data["others"]["texts"]) == (12, 4, 2)
    held_out = [example.prompt for example in read_texts(prompts)][::4]
    size = sum(len(words.encode()) for words in held_out)
    for key, hidden in (
        ("unsteered", {i: np.zeros(EXPERTS, bool) for i in masks}),
        ("steered", masks),
    ):
        bits = sum(bits_by_hand(base, words, hidden) for words in held_out)
        assert data["domain"][key] == pytest.approx(bits / size, rel=1e-4)
    lost = data["domain"]["steered"] - data["domain"]["unsteered"]
    assert data["domain"]["lost"] == pytest.approx(lost, abs=1e-9)
    one = data["reads"][0]
    assert one["batch"] == 1
    assert one["experts_unsteered"] == one["experts_steered"] == TOP_K
    many = data["reads"][-1]
    assert many["experts_steered"] <= EXPERTS / 2 < many["experts_unsteered"]
    per_expert = 3 * 32 * 16 * 4
    assert many["bytes_steered"] == pytest.approx(
        many["experts_steered"] * LAYERS * per_expert, rel=1e-6
    )


def test_profile_table_shows_the_evaluation(base: Path, prompts: Path, tmp_path: Path) -> None:
    result = run("--model", base, "--prompts", prompts, "--out", tmp_path / "p", "--keep", 1)
    assert result.exit_code == 0, result.output
    assert "8 of 8 experts stay in each of 2 layers, with 100.0%" in result.output
    assert "+0.0000 ± 0.0000" in result.output
    assert "protected (layer:expert): none" in result.output
    # Nothing is masked, and what changes nothing is not written.
    assert read_profile(tmp_path / "p").layers == {}


def test_profile_drops_choices_of_single_tokens(base: Path, prompts: Path, tmp_path: Path) -> None:
    dropped = {}
    for name, words in {"top_p": ("--top-p", 0.5), "null": ("--null", 0.4)}.items():
        out = tmp_path / name
        result = run(
            *("--model", base, "--prompts", prompts, "--out", out, "--keep", 1, "--json", *words)
        )
        assert result.exit_code == 0, result.output
        data = json.loads(result.stdout)
        profile, shape = read_profile(out), moe_shape(base)
        assert shape is not None
        check_profile(profile, shape)
        layers = profile.layers.values()
        assert len(layers) == LAYERS
        assert all((layer.top_p is None) is (name == "null") for layer in layers)
        assert all((layer.null is None) is (name == "top_p") for layer in layers)
        assert data[name] == words[1]
        one = data["reads"][0]
        # One token reads as many experts as it keeps.
        kept = one["experts_steered"] / one["experts_unsteered"]
        assert kept == pytest.approx(1 - data["dropped"], abs=0.15)
        assert data["domain"]["steered"] != data["domain"]["unsteered"]
        dropped[name] = data["dropped"]
    assert 0 < dropped["top_p"] < 1 - 1 / TOP_K
    # The share was of the texts that it was learned from.
    assert dropped["null"] == pytest.approx(0.4, abs=0.1)


def test_profile_keeps_at_least_top_k_experts(base: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "p"
    assert run("--model", base, "--prompts", prompts, "--out", out, "--keep", 0.01).exit_code == 0
    assert {int((~layer.mask).sum()) for layer in read_profile(out).layers.values()} == {TOP_K}


def test_profile_that_can_not_be_learned_raises_with_the_reason(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    empty, few, odd = tmp_path / "empty", tmp_path / "few", tmp_path / "odd"
    empty.write_text("\n \n")
    few.write_text("one\ntwo\ntwo\n")
    odd.write_text('{"question": "what?"}\n')
    out = tmp_path / "p"
    good = ("--model", base, "--out", out)
    assert refused(*good, "--prompts", empty) == f"{empty}: no prompts in it"
    assert refused(*good, "--prompts", few) == (
        f"{few}: 2 different texts in it; a few dozen are wanted, and at least 4"
    )
    assert "line 1: expected a" in refused(*good, "--prompts", odd)
    assert "can't be read" in refused(*good, "--prompts", tmp_path / "none")
    for keep in ("0", "1.5", "-1", "nan"):
        assert "allowed: above 0, at most 1" in refused(*good, "--prompts", prompts, "--keep", keep)
    for top_p in ("0", "1.5", "nan"):
        assert "top_p is" in refused(*good, "--prompts", prompts, "--top-p", top_p)
    for null in ("0", "1", "nan"):
        assert "null is" in refused(*good, "--prompts", prompts, "--null", null)
    assert "experts 0 to 7 in 2 layers" in refused(*good, "--prompts", prompts, "--protect", "1:8")
    assert "expected LAYER:EXPERT" in run(*good, "--prompts", prompts, "--protect", "x").output
    assert "there is no folder" in refused(
        "--model", base, "--prompts", prompts, "--out", tmp_path / "a" / "p"
    )
    assert "is not here; get it with: coe models pull org/nope" in refused(
        "--model", "org/nope", "--prompts", prompts, "--out", out, "--models-dir", tmp_path
    )
    assert not out.exists()
    out.write_text("mine")
    assert refused(*good, "--prompts", prompts) == (
        f"{out}: exists already; profiles are not written over"
    )
    assert out.read_text() == "mine"


def test_profile_unsupported_model_class_raises_with_its_name(
    prompts: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 258}
    dense = save(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), tmp_path / "dense")
    message = refused("--model", dense, "--prompts", prompts, "--out", tmp_path / "p")
    assert message == f"{dense}: LlamaForCausalLM is no mixture of experts"
    sparse = save(tiny_moe("phimoe"), tmp_path / "phimoe")
    message = refused("--model", sparse, "--prompts", prompts, "--out", tmp_path / "p")
    assert "PhimoeForCausalLM: its gates are of type 'phimoe'" in message


def test_profile_reads_texts_in_every_supported_form(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    path.write_text('a line\n{ no json\n{"text": "t"}\n{"prompt": "p", "answer": "a"}\na line\n')
    assert [(text.prompt, text.answer) for text in read_texts(path)] == [
        ("a line", ""),
        ("{ no json", ""),
        ("t", ""),
        ("p", "a"),
    ]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="can't be read"):
        read_texts(path)


def test_profile_counts_experts_that_a_batch_needs() -> None:
    same = np.zeros((3, 10, 2), np.int64)
    same[..., 1] = 5
    assert distinct(same, 8, 1) == distinct(same, 8, 32) == 2
    dropped = np.where(same == 5, -1, same)
    assert distinct(dropped, 8, 1) == distinct(dropped, 8, 32) == 1
    spread = np.arange(16).reshape(1, 8, 2)
    assert distinct(spread, 16, 1) == 2
    assert 14 < distinct(spread, 16, 32) <= 16
