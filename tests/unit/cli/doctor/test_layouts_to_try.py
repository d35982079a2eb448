"""The layouts that a config's experts have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.cli.doctor.layouts_to_try import default_subject, subjects_of, trial_options
from service.cli.doctor.random_models import LLAMA, MIXTRAL
from service.config import Config, VllmOptions
from service.engine.swap_proof import WeightLayout
from service.pool.swap_method import layout_of
from tests.support.tiny_dense_family import base


def config(root: Path, **pools: Any) -> Config:
    experts = {name: {"model": str(root / name)} for name in ("a", "b", "c", "gone")}
    return Config.model_validate({"experts": experts, "pools": pools})


def test_subjects_are_the_distinct_layouts_of_pools_with_engines(tmp_path: Path) -> None:
    for name in ("a", "b"):
        base(tmp_path / name)
    base(tmp_path / "c", architectures=["MistralForCausalLM"], model_type="mistral")
    vllm = {"kv_cache_bytes": "1GiB", "enforce_eager": True, "moe_capture": None}
    pools = {
        "cpu": {"experts": ["a", "b", "c", "gone"], "vllm": vllm},
        "gpu": {"experts": ["a"], "gpus": 2, "vllm": {"tensor_parallel_size": 2}},
        "not": {"experts": ["b"], "engine": "simulated"},
    }
    subjects, unread = subjects_of(config(tmp_path, **pools))
    assert [subject.layout for subject in subjects] == [
        WeightLayout("LlamaForCausalLM", "float32", eager=True),
        WeightLayout("MistralForCausalLM", "float32", eager=True),
        WeightLayout("LlamaForCausalLM", "float32", gpus=2),
    ]
    assert [subject.on_cpu for subject in subjects] == [True, True, False]
    assert subjects[1].config["model_type"] == "mistral"
    assert subjects[0].moe_config is MIXTRAL
    assert len(unread) == 1
    assert "expert gone" in unread[0]


def test_layout_is_that_which_a_pool_looks_for(tmp_path: Path) -> None:
    from service.models import ModelInfo, inspect_model

    base(tmp_path / "a")
    info = inspect_model(tmp_path / "a")
    assert isinstance(info, ModelInfo)
    online = VllmOptions(dtype="bfloat16", args={"quantization": "fp8"})
    assert layout_of(info, online, 1) == WeightLayout("LlamaForCausalLM", "bfloat16", "fp8", gpus=1)
    assert str(layout_of(info, online, 1)) == "LlamaForCausalLM bfloat16 fp8 compiled"
    assert layout_of(info, VllmOptions(), 0).dtype == "float32"


def test_layout_of_quantised_weights_has_their_form_and_the_dtype_of_activations(
    tmp_path: Path,
) -> None:
    from service.cli.doctor.random_models import QUANTIZATIONS
    from service.models import ModelInfo, inspect_model

    layouts = set()
    for number, (name, group) in enumerate((("gptq", 128), ("gptq", 64), ("awq", 128))):
        form = {**QUANTIZATIONS[name], "group_size": group}
        base(tmp_path / str(number), quantization_config=form, dtype="float16")
        info = inspect_model(tmp_path / str(number))
        assert isinstance(info, ModelInfo)
        layouts.add(layout_of(info, VllmOptions(), 1))
    assert len(layouts) == 3, "other kernels need another proof"
    assert {layout.dtype for layout in layouts} == {"float16"}


def test_trial_options_keep_kernels_and_no_text() -> None:
    args = {"quantization": "fp8", "chat_template": "{{ secret }}", "gpu_memory_utilization": 0.9}
    options = VllmOptions(
        dtype="float16",
        max_model_len=32768,
        tool_call_parser="hermes",
        trust_remote_code=True,
        args={name: value for name, value in args.items() if name != "chat_template"},
    )
    made = trial_options(options)
    assert made.args == {"quantization": "fp8"}
    assert (made.dtype, made.max_model_len, made.tool_call_parser) == ("float16", 512, None)
    assert not made.trust_remote_code


@pytest.mark.parametrize("on_gpu", [False, True])
def test_default_subject_fits_its_device(on_gpu: bool) -> None:
    subject = default_subject(on_gpu)
    assert subject.on_cpu != on_gpu
    assert subject.layout.eager == subject.options.enforce_eager == (not on_gpu)
    assert subject.layout.dtype == subject.options.dtype
    assert subject.layout.architecture in LLAMA["architectures"]
