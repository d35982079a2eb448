"""The memory plan, from what folders say of themselves."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.config import Config, read_config
from service.errors import ConfigError, ModelStoreError
from service.models import AdapterInfo, ModelInfo, MoeInfo
from service.moe.steering_profile import LayerSteering, SteeringProfile, moe_shape, write_profile
from service.pool.memory_plan import (
    ENGINE_BYTES,
    PACKING,
    REPLICA_BYTES,
    SERVERS_REPLICA_BYTES,
    PoolPlan,
    check_plan,
    folders_of,
    plan_pool,
)
from tests.unit.moe.test_steering_profile import gates

MIB = 1024**2
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


def model(**changes: Any) -> ModelInfo:
    fields: dict[str, Any] = {
        "path": Path("m"),
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization": None,
        "parameters": 50 * MIB,
        "active_parameters": 50 * MIB,
        "weight_bytes": 100 * MIB,
        "max_context_tokens": 2048,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "layers": 8,
        "attention_heads": 8,
        "kv_heads": 4,
        "head_size": 64,
        "vocab_size": 1000,
        "tied_embeddings": True,
        "moe": None,
        "needs_custom_code": False,
        "family": "f",
    }
    return ModelInfo(**{**fields, **changes})


def adapter(rank: int = 8, parameters: int = MIB) -> AdapterInfo:
    return AdapterInfo(Path("a"), None, rank, 16.0, ("q_proj",), "float32", parameters, 4 * MIB)


def config(pool: dict[str, Any] | None = None, **vllm: Any) -> Config:
    options = {"dtype": "float32", "kv_cache_bytes": "128MiB", **vllm}
    return Config.model_validate(
        {
            "experts": {"base": {"model": "m"}, "tuned": {"base": "base", "adapter": "a"}},
            "pools": {"cpu": {"vllm": options, **(pool or {})}},
        }
    )


def inspect(base: ModelInfo | None = None, tuned: AdapterInfo | None = None) -> Any:
    found = {"base": base or model(), "tuned": tuned or adapter()}
    return found.__getitem__


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data", "workers", "parts"),
    [
        (1, 1, 1, 1, 1),
        (2, 1, 1, 2, 2),
        (4, 1, 1, 4, 4),
        (8, 1, 1, 8, 4),  # four heads of keys: two workers hold the same
        (2, 2, 1, 4, 4),
        (1, 1, 4, 4, 4),  # ranks hold tokens of their own
        (2, 1, 2, 4, 4),
    ],
)
def test_plan_kv_cache_is_that_of_one_worker_as_vllm_counts_it(
    tensor: int, pipeline: int, data: int, workers: int, parts: int
) -> None:
    args = {"pipeline_parallel_size": pipeline, "data_parallel_size": data}
    given = config(
        {"gpus": workers},
        tensor_parallel_size=tensor,
        args={name: size for name, size in args.items() if size > 1},
    )
    (engine,) = plan_pool(given, "cpu", inspect(), gpu_bytes=80 * 1024**3).engines
    assert engine.kv_bytes == workers * 128 * MIB
    assert engine.kv_tokens == parts * 128 * MIB // (2 * 8 * 4 * 64 * 4)


def test_plan_context_must_fit_the_part_of_the_kv_cache_that_a_worker_holds() -> None:
    token_bytes = 2 * 8 * 4 * 64 * 4
    half = {"kv_cache_bytes": 1024 * token_bytes, "max_model_len": 2048}
    with pytest.raises(ConfigError, match=f"at least {2048 * token_bytes} bytes"):
        plan_pool(config({"gpus": 1}, **half), "cpu", inspect(), gpu_bytes=80 * 1024**3)
    two = config({"gpus": 2}, **half, tensor_parallel_size=2)
    (engine,) = plan_pool(two, "cpu", inspect(), gpu_bytes=80 * 1024**3).engines
    assert engine.kv_tokens == 2048


def test_plan_on_cpu_adds_up_weights_kv_caches_and_processes() -> None:
    plan = plan_pool(config(), "cpu", inspect())
    (engine,) = plan.engines
    # bfloat16 on disk, float32 in memory, and packed beside itself while it loads.
    assert engine.weight_bytes == 100 * MIB * 2 * 2
    assert engine.adapter_bytes == 4 * MIB
    assert engine.kv_bytes == 128 * MIB
    assert engine.kv_tokens == 128 * MIB // (2 * 8 * 4 * 64 * 4)
    assert engine.overhead_bytes == ENGINE_BYTES
    assert plan.total_bytes == REPLICA_BYTES + (400 + 4 + 128) * MIB + ENGINE_BYTES
    assert engine.adapters == ("tuned",)


def test_plan_on_gpu_counts_weights_once_and_no_processes() -> None:
    plan = plan_pool(config({"gpus": 1}, dtype="auto"), "cpu", inspect())
    assert plan.total_bytes == (100 + 2 + 128) * MIB


def three(pool: dict[str, Any], pinned: tuple[str, ...] = ()) -> Any:
    """The plan of a pool of three experts: 100, 100 and 300 MiB, packed twice as much."""
    sizes = {"a": 100, "b": 100, "c": 300}
    made = Config.model_validate(
        {
            "experts": {name: {"model": name, "pinned": name in pinned} for name in sizes},
            "router": {"fallback": "a"},
            "pools": {
                "cpu": {
                    **pool,
                    "vllm": {"kv_cache_bytes": "128MiB", "enforce_eager": True},
                }
            },
        }
    )
    found = {name: model(path=Path(name), weight_bytes=mib * MIB) for name, mib in sizes.items()}
    return plan_pool(made, "cpu", found.__getitem__)


def test_plan_with_host_bytes_uses_the_pool_s_bound() -> None:
    """Counted once, however many slots share it."""
    fixed = {n: REPLICA_BYTES + n * (128 * MIB + ENGINE_BYTES) for n in (1, 2)}
    assert three({"slots": 1}).total_bytes == fixed[1] + 2 * 500 * MIB
    assert three({"slots": 2}).total_bytes == fixed[2] + 2 * 500 * MIB
    for slots in (1, 2):
        plan = three({"slots": slots, "swap": {"host_bytes": "900MiB"}})
        assert plan.total_bytes == fixed[slots] + 900 * MIB
        assert plan.host_bytes == 0


def test_plan_on_gpu_keeps_all_weights_in_host_memory_once() -> None:
    gpu = {"gpus": 1, "slots": 2, "swap": {"method": "inplace"}}
    plan = three(gpu)
    assert plan.total_bytes == 2 * (300 + 128) * MIB
    assert plan.host_bytes == 500 * MIB
    bounded = {**gpu, "swap": {"method": "inplace", "host_bytes": "450MiB"}}
    assert three(bounded).host_bytes == 450 * MIB
    for swap in ({}, {"method": "respawn"}, {"method": "sleep", "sleep_level": 2}):
        assert three({**gpu, "swap": swap}).host_bytes == 0
    assert three({**gpu, "swap": {"method": "sleep"}}).host_bytes == 500 * MIB


GIB = 1024**3


def quantised(pool: dict[str, Any], layers: dict[str, tuple[str, int]]) -> PoolPlan:
    """The plan of a pool of experts, by name their family and the MiB of their largest layer."""
    made = Config.model_validate(
        {
            "experts": {name: {"model": name} for name in layers},
            "router": {"fallback": "a"},
            "pools": {"gpu": {"gpus": 1, "swap": {"method": "inplace"}, **pool}},
        }
    )
    found = {
        name: model(
            path=Path(name),
            weight_bytes=4 * GIB,
            quantization="gptq",
            family=family,
            changed_layer_bytes=mib * MIB,
        )
        for name, (family, mib) in layers.items()
    }
    return plan_pool(made, "gpu", found.__getitem__, gpu_bytes=24 * GIB)


@pytest.mark.parametrize(
    ("pool", "layers", "mib"),
    [
        ({"slots": 1}, {"a": ("f", 200), "b": ("f", 300)}, 900),
        ({"slots": 2, "gpus": 2}, {"a": ("f", 200), "b": ("f", 300), "c": ("f", 100)}, 900),
        # Each GPU of an engine has its part of a layer.
        (
            {"slots": 1, "gpus": 2, "vllm": {"tensor_parallel_size": 2}},
            {"a": ("f", 200), "b": ("f", 300)},
            450,
        ),
        # No engine can load these beside each other.
        ({"slots": 1}, {"a": ("f", 200), "b": ("g", 300)}, 0),
        ({"slots": 1}, {"a": ("f", 100), "b": ("f", 50), "c": ("g", 300)}, 300),
        # Kernels use these weights as they are stored.
        ({"slots": 1}, {"a": ("f", 0), "b": ("f", 0)}, 0),
        # Nothing is loaded into a running engine.
        ({}, {"a": ("f", 200), "b": ("f", 300)}, 0),
        ({"slots": 1, "swap": {"method": "respawn"}}, {"a": ("f", 200), "b": ("f", 300)}, 0),
        ({"slots": 1, "swap": {"method": "sleep"}}, {"a": ("f", 200), "b": ("f", 300)}, 0),
    ],
)
def test_plan_keeps_room_for_a_layer_that_is_made_ready_beside_an_engine(
    pool: dict[str, Any], layers: dict[str, tuple[str, int]], mib: int
) -> None:
    plan = quantised(pool, layers)
    assert {share.layer_bytes for share in plan.gpu_shares} == {mib * MIB}
    for share in plan.gpu_shares:
        if mib:
            assert share.reserved_bytes(24 * GIB) <= 0.92 * 24 * GIB
            assert share.utilization < 0.92


def test_plan_without_room_for_a_layer_beside_an_engine_is_refused() -> None:
    experts = {"a": ("f", 2000), "b": ("f", 2000)}
    fits = {"slots": 1, "vllm": {"kv_cache_bytes": "10GiB"}}
    quantised(fits, experts)
    for vllm in (
        {"kv_cache_bytes": "11GiB"},
        {"args": {"gpu_memory_utilization": 0.8}},
    ):
        quantised({"slots": 1, "vllm": vllm}, {"a": ("f", 0), "b": ("f", 0)})
        with pytest.raises(
            ConfigError, match=r"5\.86 GiB for each of them, in which a layer of another"
        ):
            quantised({"slots": 1, "vllm": vllm}, experts)


@pytest.mark.parametrize(
    ("slots", "least", "pinned", "words"),
    [
        (1, 600, (), "0.59 GiB are needed for the largest expert"),
        (2, 800, (), "0.79 GiB are needed for the largest experts of its 2 slots"),
        (1, 800, ("a",), "0.79 GiB are needed for the largest expert and the pinned ones"),
        (2, 1000, ("c",), "needed for the largest experts of its 2 slots and the pinned ones"),
    ],
)
def test_plan_host_bytes_below_the_running_units_raises(
    slots: int, least: int, pinned: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        three({"slots": slots, "swap": {"host_bytes": f"{least - 1}MiB"}}, pinned)
    assert words in caught.value.message
    assert three({"slots": slots, "swap": {"host_bytes": f"{least}MiB"}}, pinned).fits


def test_plan_simulated_pool_needs_no_memory() -> None:
    assert plan_pool(config({"engine": "simulated"}), "cpu", inspect()).total_bytes == 0


def test_plan_host_bytes_bounds_the_total() -> None:
    plan = plan_pool(config({"memory_bytes": "1GiB"}), "cpu", inspect())
    with pytest.raises(ConfigError) as caught:
        check_plan(plan, None)
    need = f"{plan.total_bytes / 1024**3:.2f} GiB"
    assert caught.value.message == (
        f"pools.cpu.memory_bytes: the experts need {need}, and only 1.00 GiB are allowed"
    )
    plan = plan_pool(config(), "cpu", inspect())
    check_plan(plan, plan.total_bytes)
    with pytest.raises(ConfigError, match=r"this machine has 1\.00 GiB"):
        check_plan(plan, 1024**3)


@pytest.mark.parametrize(
    ("base", "tuned", "vllm", "words"),
    [
        (model(needs_custom_code=True), None, {}, "brings its own code, which is not run"),
        (model(), None, {"max_model_len": 4096}, "was made for at most 2048 tokens"),
        (model(), adapter(rank=16), {}, "its rank is 16, and vllm.max_lora_rank is 8"),
        (model(), None, {"kv_cache_bytes": "1MiB"}, "or set vllm.max_model_len to at most 64"),
        (model(moe=MoeInfo(4, 2, 64)), None, {}, "LoRA on a mixture-of-experts model needs a GPU"),
        (adapter(), None, {}, "holds an adapter, not a model"),
        (model(), model(), {}, "holds a model, not an adapter"),
    ],
)
def test_plan_impossible_config_raises_before_any_start(
    base: Any, tuned: Any, vllm: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_pool(config(**vllm), "cpu", inspect(base, tuned))
    assert words in caught.value.message


def steered(tmp_path: Path, pool: dict[str, Any], mask: Any = None, **more: Any) -> Any:
    """A plan with a mixture of experts and a virtual expert of it; its gates are real."""
    folder = gates(tmp_path / "m", {"model_type": "mixtral", "num_experts_per_tok": 2}, GATE)
    shape = moe_shape(folder)
    assert shape is not None
    profile = SteeringProfile(shape, {1: LayerSteering.of(4, mask=mask, top_k=1)})
    write_profile(profile, tmp_path / "p")
    options = {"dtype": "float32", "kv_cache_bytes": "128MiB", "enforce_eager": True}
    made = Config.model_validate(
        {
            "experts": {
                "base": {"model": "m"},
                "less": {"base": "base", "profile": str(tmp_path / "p")},
                **more,
            },
            "pools": {"cpu": {**pool, "vllm": {**options, **pool.get("vllm", {})}}},
        }
    )
    info = model(path=folder, moe=MoeInfo(4, 2, 64))
    return plan_pool(made, "cpu", {"base": info, "tuned": adapter()}.__getitem__)


def test_plan_virtual_expert_uses_no_memory_and_shares_its_base_s_engine(tmp_path: Path) -> None:
    plan = steered(tmp_path, {})
    (engine,) = plan.engines
    assert (engine.base, engine.adapters) == ("base", ("less",))
    assert engine.weight_bytes == 2 * 2 * 100 * MIB
    assert steered(tmp_path, {"swap": {"host_bytes": "400MiB"}}).fits


@pytest.mark.parametrize("method", ["auto", "inplace", "respawn"])
@pytest.mark.parametrize("eager", [True, False])
def test_plan_virtual_expert_on_gpu_shares_its_base_s_weights(
    tmp_path: Path, method: str, eager: bool
) -> None:
    pool = {"gpus": 1, "swap": {"method": method}, "vllm": {"enforce_eager": eager}}
    (engine,) = steered(tmp_path, pool).engines
    assert (engine.base, engine.adapters) == ("base", ("less",))


@pytest.mark.parametrize(
    ("pool", "mask", "more", "words"),
    [
        (
            {"gpus": 1, "swap": {"method": "sleep"}},
            None,
            {},
            "experts.less.profile: swap.method sleep has an engine for each expert",
        ),
        (
            {
                "gpus": 2,
                "vllm": {
                    "tensor_parallel_size": 2,
                    "enable_expert_parallel": True,
                    "enable_eplb": True,
                    "eplb_config": {"num_redundant_experts": 2},
                },
            },
            None,
            {},
            "vllm.eplb_config.num_redundant_experts: copies of experts would be chosen among",
        ),
        ({"vllm": {"enforce_eager": False}}, None, {}, "need vllm.enforce_eager: true on CPU"),
        ({}, [1, 1, 1, 1], {}, "p: layer 1: all 4 experts are masked"),
        (
            {},
            None,
            {"tuned": {"base": "base", "adapter": "a"}},
            "LoRA on a mixture-of-experts model needs a GPU",
        ),
    ],
)
def test_plan_unsupported_virtual_expert_raises(
    tmp_path: Path, pool: dict[str, Any], mask: Any, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        steered(tmp_path, pool, mask, **more)
    assert words in caught.value.message


def test_plan_virtual_expert_of_a_dense_model_raises(tmp_path: Path) -> None:
    gates(tmp_path / "m", {"model_type": "llama"}, "model.layers.{}.mlp.up_proj.weight")
    made = Config.model_validate(
        {
            "experts": {"base": {"model": "m"}, "less": {"base": "base", "profile": "p"}},
            "pools": {"cpu": {"vllm": {"enforce_eager": True, "kv_cache_bytes": "128MiB"}}},
        }
    )
    with pytest.raises(ConfigError, match="'base' is no mixture of experts"):
        plan_pool(made, "cpu", {"base": model(path=tmp_path / "m")}.__getitem__)


def test_plan_missing_model_folder_raises_with_how_to_get_it() -> None:
    assert folders_of(config(), {"m": Path("/there")}) == {
        "base": Path("/there"),
        "tuned": Path("a"),
    }
    with pytest.raises(ModelStoreError, match="get it with: coe models pull m"):
        folders_of(config(), {})


def _plan(experts: dict[str, Any], paths: dict[str, str], gpus: int = 0) -> PoolPlan:
    pool = {"gpus": gpus, "vllm": {"kv_cache_bytes": "128MiB", "enforce_eager": True}}
    whole = Config.model_validate({"experts": experts, "pools": {"cpu": pool}})

    def inspect(name: str) -> ModelInfo | AdapterInfo:
        expert = whole.experts[name]
        moe = MoeInfo(8, 2, 64) if gpus else None
        found = Path(paths.get(name, "x"))
        return adapter() if expert.adapter is not None else model(path=found, moe=moe)

    return plan_pool(whole, "cpu", inspect)


def test_plan_pool_experts_with_identical_weights_count_once(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "m")
    same, linked, other = str(tmp_path / "m"), str(tmp_path / "link"), str(tmp_path / "n")
    paths = {"a": same, "b": linked, "c": other, "d": same}
    full: dict[str, Any] = {name: {"model": path} for name, path in paths.items()}
    plan = _plan(full, paths)
    assert plan.shared == {"b": "a", "d": "a"}
    alone = _plan({name: full[name] for name in "ac"}, paths)
    assert (plan.engines, plan.total_bytes) == (alone.engines, alone.total_bytes)
    # Not those that compute otherwise with them.
    full["b"] |= {"vllm": {"moe_backend": "triton"}}
    assert _plan(full, paths, gpus=1).shared == {"d": "a"}
    merged = {"base": "a", "adapter": "x", "form": "merged"}
    some = {"a": full["a"], "m": merged, "n": merged | {"strength": 0.5}, "o": merged}
    assert _plan(some, paths).shared == {"o": "m"}
    beside = {"base": "a", "adapter": "x"}
    variants = {"v": {"base": "f", "defaults": {}}, "w": {"base": "a", "defaults": {}}}
    plan = _plan({"a": full["a"], "e": beside, "f": beside, **variants}, paths)
    assert plan.shared == {"f": "e", "v": "e", "w": "a"}
    assert [(engine.base, engine.adapters) for engine in plan.engines] == [("a", ("e",))]


def test_plan_pool_reads_each_folder_once() -> None:
    looked: list[str] = []

    def inspect(name: str) -> ModelInfo | AdapterInfo:
        looked.append(name)
        return adapter() if name == "tuned" else model()

    plan_pool(config(), "cpu", inspect)
    assert sorted(looked) == ["base", "tuned"]


def by_command(size: str, asleep: str | None = None) -> dict[str, Any]:
    command: dict[str, Any] = {"run": ["s", "{port}"], "memory_bytes": size}
    if asleep is not None:
        command |= {"sleep": {"url": "/s", "memory_bytes": asleep}, "wake": {"url": "/w"}}
    return {"command": command}


def plan_servers(experts: dict[str, Any], gpu_bytes: int | None = None, **pool: Any) -> PoolPlan:
    options = {"dtype": "float32", "kv_cache_bytes": "128MiB", "enforce_eager": True}
    settings = {"vllm": options, **pool}
    made = Config.model_validate({"experts": experts, "pools": {"p": settings}})
    return plan_pool(made, "p", inspect(), gpu_bytes=gpu_bytes)


@pytest.mark.parametrize(
    ("experts", "slots", "expected_mib"),
    [
        ({"a": by_command("300MiB"), "b": by_command("500MiB")}, None, 800),
        ({"a": by_command("300MiB"), "b": by_command("500MiB")}, 1, 500),
        # What sleeps is beside the one that runs.
        ({"a": by_command("300MiB", "50MiB"), "b": by_command("500MiB", "70MiB")}, 1, 550),
        ({"a": by_command("300MiB", "50MiB"), "b": by_command("500MiB")}, 1, 550),
        ({n: by_command("300MiB") for n in "abc"}, 2, 600),
    ],
)
def test_plan_servers_that_take_turns_need_the_largest(
    experts: dict[str, Any], slots: int | None, expected_mib: int
) -> None:
    plan = plan_servers(experts, slots=slots)
    assert sum(engine.total_bytes for engine in plan.engines) == expected_mib * MIB
    assert plan.replica_bytes == SERVERS_REPLICA_BYTES
    assert all(engine.by_command for engine in plan.engines)


@pytest.mark.parametrize("size_mib", [1, 20_000])
def test_plan_server_shares_a_slot_with_an_engine_of_ours(size_mib: int) -> None:
    alone = plan_servers({"base": {"model": "m"}}, slots=1)
    experts = {"base": {"model": "m"}, "a": by_command(f"{size_mib}MiB")}
    (engine,) = plan_servers(experts, slots=1).engines
    # One of them has ended before the other starts.
    assert engine.total_bytes == max(alone.engines[0].total_bytes, size_mib * MIB)
    two = plan_servers(experts)
    assert [one.total_bytes for one in two.engines] == [
        alone.engines[0].total_bytes,
        size_mib * MIB,
    ]
    assert two.replica_bytes == REPLICA_BYTES


def test_plan_servers_above_the_bounds_are_refused() -> None:
    experts = {"a": by_command("3GiB"), "b": by_command("3GiB")}
    plan = plan_servers(experts, memory_bytes="4GiB")
    with pytest.raises(ConfigError, match=r"pools\.p\.memory_bytes: the experts need"):
        check_plan(plan, None)
    with pytest.raises(ConfigError, match="this machine has"):
        check_plan(plan_servers(experts), 4 * 1024**3)
    with pytest.raises(ConfigError, match=r"swap\.host_bytes is 1\.00 GiB"):
        plan_servers(experts, slots=1, swap={"host_bytes": "1GiB"})


@pytest.mark.parametrize(
    ("experts", "slots", "fits"),
    [
        ({"a": by_command("20GiB"), "b": by_command("9GiB")}, 1, True),
        ({"a": by_command("20GiB"), "b": by_command("9GiB")}, None, False),
        ({"a": by_command("10GiB"), "b": by_command("9GiB")}, None, True),
        ({"a": by_command("23GiB")}, None, False),
    ],
)
def test_plan_servers_on_a_gpu_have_to_fit_its_memory(
    experts: dict[str, Any], slots: int | None, fits: bool
) -> None:
    options = {"vllm": {}, "gpus": 1, "slots": slots}
    if fits:
        plan = plan_servers(experts, 24 * 1024**3, **options)
        assert plan.on_gpu
        assert plan.replica_bytes == 0
    else:
        with pytest.raises(ConfigError, match=r"pools\.p\.gpus: engines that share a GPU"):
            plan_servers(experts, 24 * 1024**3, **options)


def test_plan_servers_asleep_on_a_gpu_are_in_host_memory() -> None:
    experts = {"a": by_command("9GiB", "10GiB"), "b": by_command("8GiB", "9GiB")}
    plan = plan_servers(experts, 24 * 1024**3, gpus=1, slots=1, vllm={})
    assert plan.host_bytes == 19 * 1024**3


# --- routed experts that do not all fit


def mixture(layers: int = 2, experts: int = 4) -> ModelInfo:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 8)}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp"
        shapes[f"{at}.shared_experts.up_proj.weight"] = (6, 8)
        for expert in range(experts):
            shapes |= {
                f"{at}.experts.{expert}.{name}_proj.weight": (4, 8)
                for name in ("gate", "up", "down")
            }
    parameters = sum(map(math.prod, shapes.values()))
    return model(
        dtype="float32",
        moe=MoeInfo(experts, 2, 4),
        shapes=shapes,
        parameters=parameters,
        weight_bytes=4 * parameters,
    )


EXPERT = 3 * 4 * 8 * 4


def with_offload(offload: Any, experts: dict[str, Any] | None = None, **settings: Any) -> Config:
    vllm = {"kv_cache_bytes": 64 * MIB, "enforce_eager": True, "dtype": "float32"}
    vllm |= {"expert_offload": offload} | settings.pop("vllm", {})
    return Config.model_validate(
        {
            "experts": experts or {"m": {"model": "m"}},
            "pools": {"cpu": {"engine": "vllm", "vllm": vllm, **settings}},
        }
    )


def plan_offloaded(config: Config, info: ModelInfo | None = None) -> Any:
    return plan_pool(config, "cpu", lambda name: replace(info or mixture(), path=Path(name)))


def test_plan_counts_slots_and_tells_them() -> None:
    offload = {"bytes": 2 * 2 * EXPERT, "policy": "lru", "prefetch": "none"}
    made = plan_offloaded(with_offload(offload))
    whole = plan_offloaded(with_offload(None))
    info = mixture()
    others = info.weight_bytes - 8 * EXPERT
    assert whole.engines[0].weight_bytes == info.weight_bytes * PACKING
    assert made.engines[0].weight_bytes == others * PACKING + 6 * EXPERT
    assert made.moe[-1] == (
        "m: 2 of 4 routed experts of each of 2 layers in memory, 0.00 GiB; policy lru, "
        "prefetch none"
    )
    assert len(made.moe) == len(whole.moe) + 1


TWO_MIXTURES = {"m": {"model": "m"}, "n": {"model": "n"}}


@pytest.mark.parametrize(
    ("experts", "settings", "info", "message"),
    [
        ({}, {}, model(), "expert_offload: none of its experts is a mixture of experts"),
        ({}, {"offload": {"bytes": 10}}, None, "takes 768; allowed is that or more"),
        (TWO_MIXTURES, {"slots": 1}, None, "a slot for each expert, and swap.method: respawn"),
        (
            {"m": {"model": "m"}, "n": {"base": "m", "profile": "p"}},
            {},
            None,
            "'n' is steered",
        ),
    ],
)
def test_plan_that_can_not_be_served_raises(
    experts: dict[str, Any], settings: dict[str, Any], info: ModelInfo | None, message: str
) -> None:
    offload = settings.pop("offload", {"bytes": "1GiB"})
    with pytest.raises(ConfigError, match=message):
        plan_offloaded(with_offload(offload, experts, **settings), info)


def test_plan_experts_that_respawn_may_share_a_slot() -> None:
    infos = {name: mixture(layers) for name, layers in (("m", 1), ("n", 2))}
    config = with_offload({"bytes": "1GiB"}, TWO_MIXTURES, slots=1, swap={"method": "respawn"})
    made = plan_pool(config, "cpu", lambda name: infos[name])
    assert len(made.engines) == 1


@pytest.mark.parametrize(
    ("offload", "settings", "message"),
    [
        ({}, {}, "expert_offload.bytes"),
        ({"bytes": -1}, {}, "expert_offload.bytes"),
        ({"bytes": "4GiB", "policy": "fifo"}, {}, "'lru', 'lfu', 'segment', 'decay'"),
        ({"bytes": "4GiB", "prefetch": "all"}, {}, "'none', 'frequency' or 'next_gate'"),
        ({"bytes": "4GiB", "precision": "int8"}, {}, "precision"),
        ({"bytes": "4GiB"}, {"gpus": 1}, "works on CPU only"),
        ({"bytes": "4GiB"}, {"vllm": {"enforce_eager": False}}, "needs enforce_eager: true"),
        ({"bytes": "4GiB"}, {"vllm": {"spare_adapters": 1}}, "spare_adapters must be 0"),
        ({"bytes": "4GiB"}, {"engine": "simulated"}, "needs engine: vllm"),
    ],
)
def test_wrong_setting_gets_one_clear_error(
    offload: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    vllm = {"kv_cache_bytes": 64 * MIB, "enforce_eager": True} | settings.pop("vllm", {})
    raw = {
        "experts": {"m": {"model": "m"}},
        "pools": {
            "cpu": {"engine": "vllm", "vllm": {**vllm, "expert_offload": offload}, **settings}
        },
    }
    with pytest.raises(ConfigError) as caught:
        read_config(raw, "coe.yaml", Path())
    assert message in caught.value.message
    assert len(caught.value.message.splitlines()) == 1
