"""What vLLM's own arguments change in the memory plan, and which of them swaps can't have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.errors import ConfigError
from service.models import ModelInfo
from service.pool.memory_plan import PoolPlan, plan_pool
from tests.unit.pool.test_memory_plan import MIB, adapter, model

GIB = 1024**3
SHAPES = {
    "model.embed_tokens.weight": (1000, 512),
    "model.layers.0.mlp.up_proj.weight": (1024, 25600),
    "model.layers.0.mlp.experts.0.up_proj.weight": (1024, 10240),
    "model.norm.weight": (512,),
}


def plan(
    args: dict[str, Any],
    *,
    pool: dict[str, Any] | None = None,
    form: str | None = None,
    folder: ModelInfo | None = None,
    **vllm: Any,
) -> PoolPlan:
    """The plan of a pool of two experts of 100 MiB: 50 Mi parameters in bfloat16."""
    second: dict[str, Any] = {"model": "m2"}
    if form is not None:
        second = {"base": "a", "adapter": "x", "form": form}
    config = Config.model_validate(
        {
            "experts": {"a": {"model": "m"}, "b": second},
            "router": {"fallback": "a"},
            "pools": {"p": {"vllm": {**vllm, "args": args}, **(pool or {})}},
        }
    )
    info = model(shapes=SHAPES)
    second_info = adapter() if form is not None else dataclasses.replace(info, path=Path("m2"))
    found: dict[str, Any] = {"a": info, "b": second_info}
    return plan_pool(
        config, "p", found.__getitem__, lambda path: folder or model(weight_bytes=30 * MIB)
    )


GPU: dict[str, Any] = {"gpus": 1}
CACHE: dict[str, Any] = {"kv_cache_bytes": "64MiB"}
PER_TOKEN = 2 * 8 * 4 * 64


@pytest.mark.parametrize(
    ("dtype", "element"),
    [("auto", 2), ("bfloat16", 2), ("float16", 2), ("fp8", 1), ("fp8_e5m2", 1), ("nvfp4", 1)],
)
def test_dtype_of_the_kv_cache_decides_its_tokens(dtype: str, element: int) -> None:
    for engine in plan({"kv_cache_dtype": dtype}, pool=GPU, **CACHE).engines:
        assert engine.kv_tokens == 64 * MIB // (PER_TOKEN * element)


def test_dtype_of_the_kv_cache_decides_whether_a_context_fits() -> None:
    vllm: dict[str, Any] = {"kv_cache_bytes": 2048 * PER_TOKEN}
    with pytest.raises(ConfigError, match="kv_cache_bytes holds 1024 tokens"):
        plan({}, pool=GPU, **vllm)
    assert plan({"kv_cache_dtype": "fp8"}, pool=GPU, **vllm)


@pytest.mark.parametrize(
    ("form", "saved"),
    [
        ("fp8", 1024 * 25600 + 1024 * 10240),
        ("fp8_per_channel", 1024 * 25600 + 1024 * 10240),
        ("mxfp4", 1024 * 25600 + 1024 * 10240),
        ("int8_per_channel_weight_only", 1024 * 10240),
        ("awq", 0),
    ],
)
def test_quantization_while_loading_shrinks_matrices(form: str, saved: int) -> None:
    for engine in plan({"quantization": form}, pool=GPU, **CACHE).engines:
        assert engine.weight_bytes == 100 * MIB - saved


def test_offload_moves_weights_to_host_memory() -> None:
    moved = plan({"cpu_offload_gb": 0.03125}, pool=GPU, **CACHE)  # 32 MiB
    assert [engine.weight_bytes for engine in moved.engines] == [68 * MIB] * 2
    assert moved.host_bytes == 64 * MIB
    everything = plan({"cpu_offload_gb": 9}, pool=GPU, **CACHE)
    assert [engine.weight_bytes for engine in everything.engines] == [0, 0]
    assert everything.host_bytes == 200 * MIB


def test_offload_counts_for_each_gpu_of_an_engine() -> None:
    args = {"cpu_offload_gb": 0.03125, "pipeline_parallel_size": 2}
    spread = plan(args, pool={"gpus": 2}, **CACHE)
    assert [engine.weight_bytes for engine in spread.engines] == [36 * MIB] * 2


def test_kv_offload_takes_host_memory() -> None:
    assert plan({"kv_offloading_size": 2}, pool=GPU, **CACHE).host_bytes == 4 * GIB


def test_ranks_of_data_parallelism_have_their_own_weights_and_caches() -> None:
    for engine in plan({"data_parallel_size": 3}, pool={"gpus": 3}, **CACHE).engines:
        assert engine.weight_bytes == 300 * MIB
        assert engine.kv_bytes == 3 * 64 * MIB


@pytest.mark.parametrize(("pool", "copies"), [(GPU, 1), ({}, 2)])
def test_draft_model_counts_beside_the_weights(pool: dict[str, Any], copies: int) -> None:
    draft = {"speculative_config": {"model": "./draft", "num_speculative_tokens": 2}}
    with_draft, without = (plan(args, pool=pool, **CACHE) for args in (draft, {}))
    assert [engine.draft_bytes for engine in with_draft.engines] == [30 * MIB * copies] * 2
    assert with_draft.total_bytes == without.total_bytes + 60 * MIB * copies


def test_draft_model_with_its_own_code_is_refused() -> None:
    draft = {"speculative_config": {"model": "./draft"}}
    with pytest.raises(ConfigError, match=r"speculative_config\.model: .* brings its own code"):
        plan(draft, pool=GPU, folder=model(needs_custom_code=True))


def test_share_of_the_gpu_is_what_an_engine_takes() -> None:
    pool = {"gpus": 1, "memory_bytes": "1GiB"}
    shared = plan({"gpu_memory_utilization": 0.5}, pool=pool)
    assert [engine.total_bytes for engine in shared.engines] == [GIB // 2] * 2
    assert shared.fits
    left = GIB // 2 - 100 * MIB
    assert [engine.kv_tokens for engine in shared.engines] == [left // (PER_TOKEN * 2)] * 2
    with pytest.raises(ConfigError, match=r"leaves 0\.05 GiB of memory_bytes to 'a', whose weig"):
        plan({"gpu_memory_utilization": 0.05}, pool=pool)


def test_shares_of_engines_on_one_gpu_add_up_to_at_most_one() -> None:
    with pytest.raises(ConfigError) as caught:
        plan({"gpu_memory_utilization": 0.6}, pool=GPU)
    assert caught.value.message == (
        "pools.p.vllm.args.gpu_memory_utilization: 2 engines of a replica share its GPUs, and each "
        "would take 0.6 of their memory; set it to at most 0.5, or set vllm.kv_cache_bytes"
    )
    assert plan({"gpu_memory_utilization": 0.6}, pool={"gpus": 1, "slots": 1})
    assert plan({"gpu_memory_utilization": 0.6}, pool=GPU, **CACHE)
    assert plan(
        {"gpu_memory_utilization": 0.6}, pool={"gpus": 1, "slots": 1, "swap": {"method": "sleep"}}
    )


@pytest.mark.parametrize(
    ("args", "vllm"),
    [
        ({"cpu_offload_gb": 1}, {}),
        ({"kv_offloading_size": 1}, {}),
        ({"gpu_memory_utilization": 0.5}, CACHE),
    ],
)
def test_argument_without_effect_on_cpu_is_refused(
    args: dict[str, Any], vllm: dict[str, Any]
) -> None:
    (name,) = args
    with pytest.raises(ConfigError, match=rf"pools\.p\.vllm\.args\.{name}: it has no effect"):
        plan(args, **vllm)
    assert plan(args, pool=GPU, **({} if vllm else CACHE))


BLOCKING: list[dict[str, Any]] = [
    {"quantization": "fp8"},
    {"quantization_config": {"linear": "fp8"}},
    {"cpu_offload_gb": 1},
    {"offload_group_size": 2},
    {"kv_offloading_size": 1},
    {"pipeline_parallel_size": 2},
    {"data_parallel_size": 2},
    {"speculative_config": {"model": "./draft"}},
    {"speculative_config": {"method": "eagle", "model": "./draft"}},
]


@pytest.mark.parametrize("args", BLOCKING)
def test_swap_in_place_refuses_what_holds_the_weights(args: dict[str, Any]) -> None:
    (name,) = args
    pool = {"gpus": 2, "slots": 1, "swap": {"method": "inplace"}}
    with pytest.raises(ConfigError, match=rf"args\.{name}: experts that are swapped in place take"):
        plan(args, pool=pool, **CACHE)
    # No GPU may be left over.
    gpus = args.get("pipeline_parallel_size", args.get("data_parallel_size", 1))
    respawned = {"gpus": gpus, "slots": 1, "swap": {"method": "respawn"}}
    for other in (respawned, {"gpus": 2}):
        assert plan(args, pool=other, **CACHE)


@pytest.mark.parametrize("args", [{"quantization": "fp8"}, {"kv_offloading_size": 1}])
def test_merged_experts_refuse_what_holds_the_weights(args: dict[str, Any]) -> None:
    (name,) = args
    with pytest.raises(ConfigError, match=rf"args\.{name}: merged experts take the weights"):
        plan(args, pool={"gpus": 1, "slots": 2}, form="merged", **CACHE)


@pytest.mark.parametrize(
    "args", [{"seed": 1}, {"speculative_config": {"method": "ngram"}}, {"kv_cache_dtype": "fp8"}]
)
def test_swap_in_place_keeps_other_arguments(args: dict[str, Any]) -> None:
    assert plan(args, pool={"slots": 1}, enforce_eager=True, **CACHE)


def test_overridden_config_is_warned_of() -> None:
    pool = {**GPU, "memory_bytes": "24GiB"}
    (line,) = plan({"hf_overrides": {"a": 1}}, pool=pool).warnings
    assert line.startswith("pools.p.vllm.args.hf_overrides: the memory plan")
