"""vLLM's own arguments in vLLM itself: which exist, which pass, and what it says of wrong ones."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from service.config import Config, VllmOptions
from service.config.vllm_args import OWNED, PASSED
from service.engine.gpu_share import GpuShare
from service.engine.vllm import async_llm_handle
from service.engine.vllm.argument_check import check_arguments
from service.errors import ConfigError

pytestmark = [
    pytest.mark.engine,
    pytest.mark.filterwarnings("ignore"),  # vLLM's and torch's own
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# Values of arguments that are not made of one flag, choice, number or text.
STRUCTURED: dict[str, Any] = {
    "attention_backend": "TRITON_ATTN",
    "attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 3},
    "cudagraph_capture_sizes": [1, 2],
    "mamba_backend": "flashinfer",
    "numa_bind_nodes": [0, 1],
}


@cache
def _parser() -> Any:
    return async_llm_handle._argument_parser()


def _value_of(name: str) -> Any:
    """A value of this argument that is not its default."""
    if name in STRUCTURED:
        return STRUCTURED[name]
    action = next(a for a in _parser()._actions if a.dest == name)
    if action.nargs == 0:
        return not action.default
    if action.choices:
        return next(c for c in action.choices if c not in (None, action.default))
    if action.nargs == "+":
        return ["1", "2"]
    if action.type is str:
        return "else"
    for value in ((action.default or 0) + 3, 0.25, "7") if _is_simple(action) else ():
        try:
            async_llm_handle._parsed(_parser(), {name: value})
        except ValueError:
            continue
        return value
    return {}


def _is_simple(action: Any) -> bool:
    return action.default is None or isinstance(action.default, int | float | str)


def test_every_argument_of_vllm_is_owned_or_passes() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert fields == PASSED | OWNED.keys()
    assert not PASSED & OWNED.keys()


def test_service_sets_no_argument_that_passes() -> None:
    tree = ast.parse(Path(async_llm_handle.__file__).read_text())
    assigned = {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "args"
    }
    assert "load_format" in assigned  # else this test finds nothing
    # The share of a GPU is computed only where the operator gave none; see the next test.
    assert assigned & PASSED == {"gpu_memory_utilization"}


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 0.25), ({"gpu_memory_utilization": 0.5}, 0.5)]
)
def test_the_operators_share_of_a_gpu_goes_before_the_computed_one(
    given: dict[str, float], expected: float
) -> None:
    settings = async_llm_handle.LaunchSettings(
        model=".",
        served_name="a",
        options=VllmOptions(args=given),
        on_cpu=True,
        enforce_eager=True,
        gpu_share=GpuShare(0.25),
    )
    assert async_llm_handle._frontend_args(settings).gpu_memory_utilization == expected


@pytest.mark.parametrize("name", sorted(PASSED))
def test_argument_reaches_the_engine_as_vllm_reads_it(name: str) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    value = _value_of(name)
    parsed = async_llm_handle._parsed(_parser(), {name: value})
    made = getattr(AsyncEngineArgs.from_cli_args(Namespace(**{**vars(parsed), "model": "."})), name)
    if isinstance(value, dict) and not isinstance(made, dict):
        # vLLM makes an object of a mapping.
        made, value = type(made).__name__, type(getattr(parsed, name)).__name__
    elif value != made:
        value, made = str(value), str(made)
    assert made == value


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"kv_cache_dtype": "fp9"}, "invalid choice: 'fp9' (choose from"),
        ({"seed": 1.5}, "invalid int value: '1.5'"),
        ({"seed": True}, "expected one argument"),
        ({"enable_prefix_caching": 3}, "ignored explicit argument '3'"),
        ({"attention_config": {"nope": 1}}, "nope"),
        ({"generation_config": {"a": 1}}, "a text is needed"),
        ({"block_size": [16, 32]}, "one value is needed, not the list [16,32]"),
        ({"watermark": -0.5}, None),
        ({"stream_interval": 2, "max_num_batched_tokens": "4k", "async_scheduling": False}, None),
    ],
)
def test_wrong_value_gets_vllm_s_own_message(args: dict[str, Any], words: str | None) -> None:
    faults = async_llm_handle.argument_faults(args)
    if words is None:
        assert faults == {}
    else:
        assert list(faults) == list(args)
        assert words in faults[next(iter(args))]


def test_values_are_checked_in_a_process_of_its_own() -> None:
    pools = {
        "good": {"vllm": {"args": {"block_size": 16}}},
        "bad": {"vllm": {"args": {"performance_mode": "fast", "seed": 1}}},
    }
    config = Config.model_validate({"experts": {"a": {"model": "m"}}, "pools": pools})
    with pytest.raises(ConfigError) as caught:
        check_arguments(config)
    (line,) = caught.value.message.splitlines()
    assert line.startswith("pools.bad.vllm.args.performance_mode: vLLM refuses it: invalid choice")
