"""Quantised forms of matrices, unpacked again by code of this test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from service.cli.doctor.quantised_weights import form_of  # noqa: E402
from service.cli.doctor.random_models import (  # noqa: E402
    LLAMA,
    MIXTRAL,
    QUANTIZATIONS,
    SMALL,
    exact_folder,
    small_config,
    write_random_model,
)

_OUT, _INTO = 256, 384


def _words(packed: Any, bits: int, dim: int) -> Any:
    """Unpack int32 along a dimension, as the formats' documents say it."""
    rows = packed.movedim(dim, -1).tolist()

    def unpack(row: Any) -> Any:
        if isinstance(row[0], list):
            return [unpack(one) for one in row]
        words = [word & 0xFFFFFFFF for word in row]
        return [(w >> at) & (2**bits - 1) for w in words for at in range(0, 32, bits)]

    return torch.tensor(unpack(rows)).movedim(-1, dim)


def _decode(form: str, parts: dict[str, Any]) -> Any:
    if form == "gptq":
        steps = _words(parts["qweight"], 4, 0)
        zero = _words(parts["qzeros"], 4, 1) + 1
        group = parts["g_idx"].long()
        return ((steps - zero[group]) * parts["scales"].float()[group]).T
    if form == "awq":
        places = [0, 4, 1, 5, 2, 6, 3, 7]  # of each value within its word
        steps, zero = (
            _words(parts[name], 4, 1).reshape(-1, _OUT // 8, 8)[..., places].reshape(-1, _OUT)
            for name in ("qweight", "qzeros")
        )
        group = torch.arange(_INTO) // 128
        return ((steps - zero[group]) * parts["scales"].float()[group]).T
    if form == "packed":
        assert parts["weight_shape"].tolist() == [_OUT, _INTO]
        steps = _words(parts["weight_packed"], 4, 1) - 8
        return steps * parts["weight_scale"].float().repeat_interleave(128, 1)
    if form == "fp8-block":
        scale = parts["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        return parts["weight"].float() * scale
    return parts["weight"].float() * parts["weight_scale"]


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_stored_weights_stand_for_the_exact_values_near_the_given_ones(name: str) -> None:
    form = form_of({"quantization_config": QUANTIZATIONS[name]})
    assert form is not None
    weight = torch.randn(_OUT, _INTO, generator=torch.Generator().manual_seed(3))
    stored, values = form.quantise("model.layers.0.x.weight", weight)
    parts = {path.removeprefix("model.layers.0.x."): tensor for path, tensor in stored.items()}
    assert torch.allclose(_decode(name, parts), values, atol=1e-6)
    assert (values - weight).abs().mean() < 0.12
    assert not torch.equal(values, weight)
    assert sum(t.numel() * t.element_size() for t in stored.values()) < 1.2 * weight.numel()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"quant_method": "bitsandbytes"}, "no random weights of bitsandbytes"),
        ({"quant_method": "awq", "version": "gemv"}, "of this form of awq"),
        ({**QUANTIZATIONS["gptq"], "desc_act": True}, "of this form of gptq"),
        ({**QUANTIZATIONS["gptq"], "bits": 3}, "of this form of gptq"),
        ({**QUANTIZATIONS["gptq"], "sym": False}, "of this form of gptq"),
        ({**QUANTIZATIONS["packed"], "format": "marlin-24"}, "of this form of compressed"),
        ({**QUANTIZATIONS["packed"], "config_groups": {}}, "of this form of compressed"),
        ({}, "of unknown"),
    ],
)
def test_forms_that_are_not_made_are_named(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        form_of({"quantization_config": given})


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("model.layers.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.experts.3.w1.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.layers.1.mlp.up_proj.weight", False),
        ("model.layers.2.self_attn.o_proj.weight", False),
        ("lm_head.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_form_takes_matrices_of_layers_but_exceptions(name: str, takes: bool) -> None:
    ignore = ["lm_head", "model.layers.1.", "re:.*o_proj$"]
    form = form_of({"quantization_config": {**QUANTIZATIONS["int8"], "ignore": ignore}})
    assert form is not None
    assert form.takes(name, torch.zeros(2, 2)) is takes
    assert not form.takes(name, torch.zeros(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["dense", "mixture"])
@pytest.mark.parametrize("name", ["gptq", "fp8"])
def test_random_quantised_models_have_a_folder_of_their_exact_values(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    from safetensors.torch import load_file

    from service.models import ModelInfo, inspect_model

    given = {**config, "head_dim": 80, "quantization_config": QUANTIZATIONS[name]}
    small = small_config(given, SMALL)
    assert small["hidden_size"] % 128 == small["intermediate_size"] % 128 == 0
    families = set()
    for seed in (0, 1):
        folder = tmp_path / f"m{seed}"
        write_random_model(folder, small, "bfloat16", seed)
        info = inspect_model(folder)
        assert isinstance(info, ModelInfo)
        assert info.quantization == QUANTIZATIONS[name]["quant_method"]
        assert info.compute_dtype == "bfloat16"
        families.add(info.family)
    assert len(families) == 1
    exact = exact_folder(folder)
    assert exact != folder
    assert "quantization_config" not in json.loads((exact / "config.json").read_text())
    values = load_file(exact / "model.safetensors")
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert not any(path.endswith(("scales", "weight_scale")) for path in values)
    assert exact_folder(exact) == exact
