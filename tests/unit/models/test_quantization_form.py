"""Forms of quantised weights."""

from __future__ import annotations

from typing import Any

import pytest

from service.models.quantization_form import quantization_facts, quantization_form

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def config(**given: Any) -> dict[str, Any]:
    return {"quantization_config": {**GPTQ, **given}}


@pytest.mark.parametrize(
    "more",
    [
        {"meta": {"quantizer": ["gptqmodel:2.0"]}},
        {"damp_percent": 0.1, "static_groups": False, "true_sequential": True},
        {"dataset": "c4", "tokenizer": "x", "model_name_or_path": "y"},
        {"version": "0.11"},
        {"modules_in_block_to_quantize": None},
    ],
)
def test_form_forgets_how_weights_were_made(more: dict[str, Any]) -> None:
    assert quantization_form(config(**more)) == quantization_form(config())
    assert quantization_facts(config(**more)) == GPTQ


@pytest.mark.parametrize(
    "more", [{"bits": 8}, {"group_size": 64}, {"sym": False}, {"lm_head": True}, {"dynamic": {}}]
)
def test_form_tells_kernels_and_layouts_apart(more: dict[str, Any]) -> None:
    assert quantization_form(config(**more)) != quantization_form(config())


def test_form_of_awq_has_the_version_of_its_packing() -> None:
    forms = {
        quantization_form({"quantization_config": {"quant_method": "awq", "version": version}})
        for version in ("gemm", "gemv")
    }
    assert len(forms) == 2


def test_form_has_a_name_that_says_what_it_is() -> None:
    assert quantization_form({}) is None
    assert quantization_form({"quantization_config": None}) is None
    named = quantization_form(config())
    assert named is not None
    assert named.startswith("gptq, 4 bits, groups of 128 (")
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert str(quantization_form(block)).startswith("fp8, blocks (")
