"""Dense experts become one mixture: what it computes, what it remembers, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loadtests.moe_build import right_share
from router_models.moe import (
    bits_per_byte,
    dense_loading,
    dense_reader,
    gate_fit,
    upcycle,
    upcycling_texts,
)
from router_models.moe.dense_reader import UpcycleError
from service.models import ModelInfo, inspect_model, locate
from tests.support import tiny_dense_family as family

# transformers' own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
_LETTERS = {"general": "abcdefgh ", "sums": "0123456789+=", "law": "QRSTUVWX§"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, texts, and a mixture of all three in `moe`."""
    root = tmp_path_factory.mktemp("family")
    family.base(root / "base")
    family.adapter(root / "sums", "org/base", 1)
    family.adapter(root / "law", "base", 2)
    family.texts(root / "texts", **_LETTERS)
    _build(root, root / "base", root / "moe", "sums", "law")
    return root


def _build(root: Path, base: Path, out: Path, *names: str, top_k: int = 1) -> list[str]:
    lines: list[str] = []
    work = upcycle.plan(base, {name: root / name for name in names}, root / "texts")
    upcycle.build(work, out, top_k=top_k, say=lines.append)
    return lines


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    ).eval()


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def _tokens() -> torch.Tensor:
    return torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(3))


def test_upcycle_writes_a_standard_mixtral_with_the_base_s_tokenizer(made: Path) -> None:
    info = inspect_model(made / "moe")
    assert isinstance(info, ModelInfo)
    assert (info.architecture, info.model_type) == ("MixtralForCausalLM", "mixtral")
    assert info.moe is not None
    assert (info.moe.experts, info.moe.experts_per_token) == (3, 1)
    assert info.tied_embeddings
    config = json.loads((made / "moe/config.json").read_text())
    assert config["sliding_window"] is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / "moe" / name).read_bytes() == (made / "base" / name).read_bytes()
    card = (made / "moe/README.md").read_text()
    assert "| 1 | sums | `sums` | the user's own file sums.jsonl | as its owner says |" in card
    assert locate(str(made / "moe")) == (made / "moe").resolve()
    assert not list(made.glob(".*"))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_upcycle_of_identical_experts_computes_as_the_base(
    made: Path, tmp_path: Path, top_k: int
) -> None:
    for name in ("sums", "law"):
        family.adapter(tmp_path / name, "base", 5, size=0.0)
    (tmp_path / "texts").symlink_to(made / "texts")
    _build(tmp_path, made / "base", tmp_path / "moe", "sums", "law", top_k=top_k)
    dense_logits = _logits(_model(made / "base"), _tokens())
    moe_logits = _logits(_model(tmp_path / "moe"), _tokens())
    torch.testing.assert_close(moe_logits, dense_logits, rtol=0, atol=2e-5)


def test_upcycle_each_expert_computes_as_its_dense_model_when_chosen(
    made: Path, tmp_path: Path
) -> None:
    (tmp_path / "moe").symlink_to(made / "moe")
    for index, name in enumerate(("general", "sums", "law")):
        model = _model(made / "moe")
        with torch.no_grad():
            for layer in model.model.layers:
                # All ones for the one expert on what is always positive: it wins everywhere.
                layer.mlp.gate.forward = _always(index)
        folder = made / name if name != "general" else made / "base"
        adapter = None if name == "general" else folder
        merged = dense_loading.blank(family.config())
        dense_loading.fill(merged, dense_reader.Dense(name, made / "base", adapter))
        torch.testing.assert_close(
            _logits(model, _tokens()), _logits(merged, _tokens()), rtol=0, atol=2e-5
        )


def _always(expert: int) -> Any:
    def choose(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = hidden.reshape(-1, family.HIDDEN).shape[0]
        return torch.zeros(rows, 3), torch.ones(rows, 1), torch.full((rows, 1), expert)

    return choose


def test_upcycle_gates_separate_the_domains(made: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(made / "moe"))
    model = _model(made / "moe")
    for index, name in enumerate(("general", "sums", "law")):
        held_out = upcycling_texts.read(name, made / "texts").held_out
        share = right_share(model, bits_per_byte.conversations(held_out, tokenizer), index)
        right = float(share.mean())
        assert right > 0.8, f"{name}: {right}"


def test_upcycle_adding_an_expert_later_equals_building_at_once(made: Path, tmp_path: Path) -> None:
    _build(made, made / "base", tmp_path / "two", "sums")
    few = tmp_path / "texts"
    family.texts(few, law=_LETTERS["law"])  # the others' texts are not here any more
    work = upcycle.plan(tmp_path / "two", {"law": made / "law"}, few)
    upcycle.build(work, tmp_path / "three", top_k=1)
    for name in ("shared", "expert-000", "expert-001", "expert-002"):
        grown = load_file(tmp_path / "three" / f"{name}.safetensors")
        whole = load_file(made / "moe" / f"{name}.safetensors")
        assert grown.keys() == whole.keys()
        for key in grown:
            torch.testing.assert_close(grown[key], whole[key], rtol=0, atol=1e-6)
    for name in ("config.json", "model.safetensors.index.json", "README.md"):
        assert (tmp_path / "three" / name).read_text() == (made / "moe" / name).read_text()
    # What was extended is as it was.
    assert len(list((tmp_path / "two").glob("expert-*"))) == 2
    with pytest.raises(UpcycleError, match=r"'law' is in .* already"):
        upcycle.plan(tmp_path / "three", {"law": made / "law"}, few)


def test_upcycle_gates_are_the_ridge_regression() -> None:
    draw = np.random.default_rng(0)
    fields = [draw.normal(size=(50, 8)) + draw.normal(size=8) for _ in range(3)]
    statistics = gate_fit.Statistics.empty(1, 8)
    for i, x in enumerate(fields):
        origin = gate_fit.Origin(f"e{i}", "w", "s", "l", 1, len(x))
        own = gate_fit.Moments((x.T @ x / len(x))[None], x.mean(axis=0)[None])
        statistics = statistics.added(origin, own)
    x, y = np.concatenate(fields) / 50**0.5, np.repeat(np.eye(3), 50, axis=0) / 50**0.5
    solved = np.linalg.inv(x.T @ x + 1e-2 * np.eye(8)) @ x.T @ y
    expected = 4 * solved / np.linalg.norm(solved, axis=0)
    np.testing.assert_allclose(statistics.gates(scale=4.0)[0], expected.T, rtol=1e-5)


def test_upcycle_statistics_round_trip_and_damaged_files_raise(made: Path, tmp_path: Path) -> None:
    path = made / "moe" / dense_reader.STATISTICS
    read = gate_fit.read(path)
    gate_fit.write(read, tmp_path / "again.safetensors")
    again = gate_fit.read(tmp_path / "again.safetensors")
    assert again.origins == read.origins
    np.testing.assert_array_equal(again.gram, read.gram)
    np.testing.assert_array_equal(again.cross, read.cross)
    assert read.experts == ("general", "sums", "law")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(gate_fit.ArtifactError, match=r"cut\.safetensors: can't be read"):
        gate_fit.read(tmp_path / "cut.safetensors")
    save_file({"x": torch.ones(1)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(gate_fit.ArtifactError, match="format None"):
        gate_fit.read(tmp_path / "other.safetensors")


def test_upcycle_reports_changes_outside_the_ffns_as_lost(made: Path, tmp_path: Path) -> None:
    family.adapter(tmp_path / "sums", "base", 1, part="self_attn", size=0.1)
    (tmp_path / "texts").symlink_to(made / "texts")
    lines = _build(tmp_path, made / "base", tmp_path / "moe", "sums")
    assert lines[0].startswith("sums: 2 weights outside its FFNs differ from the base's by ")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_size": 48, "head_dim": 24}, r"hidden_size is 48.*multiples of 32"),
        ({"intermediate_size": 80}, r"intermediate_size is 80.*multiples of 32"),
        ({"model_type": "gpt_neox"}, r"model_type 'gpt_neox'"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_upcycle_base_that_can_not_be_a_mixtral_raises(
    made: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    folder = family.base(tmp_path / "base", **changed)
    with pytest.raises(UpcycleError, match=said):
        upcycle.plan(folder, {"sums": made / "sums"}, made / "texts")


def test_upcycle_experts_that_do_not_fit_raise_with_their_names(made: Path, tmp_path: Path) -> None:
    def refused(experts: dict[str, Path], base: Path = made / "base") -> str:
        with pytest.raises(dense_reader.ArtifactError) as error:
            upcycle.build(upcycle.plan(base, experts, made / "texts"), tmp_path / "m", top_k=1)
        assert not (tmp_path / "m").exists()
        assert not list(tmp_path.glob(".m*"))
        return error.value.message

    wide = family.base(tmp_path / "wide", intermediate_size=128)
    assert "law: " in refused({"law": wide})
    assert "intermediate_size is 128, the base's 96" in refused({"law": wide})
    other = family.base(tmp_path / "other", seed=9)
    assert "was not made of this base" in refused({"law": other})
    stranger = family.adapter(tmp_path / "stranger", "org/smol", 3)
    assert "law: the adapter in" in refused({"law": stranger})
    assert "made for the base 'org/smol'" in refused({"law": stranger})
    assert "no texts for 'poems'" in refused({"poems": made / "law"})
    assert "no such folder" in refused({"law": tmp_path / "nothing"})
    assert "no experts" in refused({})
    assert "is a LoRA adapter" in refused({"law": made / "law"}, base=made / "sums")
    assert "'general' is in" in refused({"general": made / "law"})


def test_upcycle_existing_folder_or_too_large_top_k_raises(made: Path, tmp_path: Path) -> None:
    work = upcycle.plan(made / "base", {"sums": made / "sums"}, made / "texts")
    with pytest.raises(UpcycleError, match="exists already"):
        upcycle.build(work, made / "moe", top_k=1)
    with pytest.raises(UpcycleError, match="top-k 3: there are 2 experts"):
        upcycle.build(work, tmp_path / "m", top_k=3)
