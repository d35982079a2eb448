"""A pool that goes on by another config."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import orjson
import pytest

from service.config import Config
from service.engine.engine_interface import Message
from service.engine.simulated_engine import SimulatedEngine
from service.errors import CoeError, ConfigError, UnknownModelError
from service.moe.steering_profile import LayerSteering, SteeringProfile, moe_shape, write_profile
from service.pool.gpu_memory_plan import LAYER_COPIES
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.rpc.call_headers import Call
from service.telemetry.pool_metrics import PoolMetrics
from service.torch_build import TorchBuild
from tests.support.answer_gate import held_answers
from tests.support.polling import until
from tests.unit.models.test_model_inspection import TENSORS, Tensors, make_model
from tests.unit.moe.test_steering_profile import gates


def config(names: str, slots: int | None, **changed: Any) -> Config:
    experts = {name: {"model": changed.get(name, "m")} for name in names}
    simulated = {"decode_ms": 10, "tokens": 4, "fill_s": 0.02, "swap_s": 0.01}
    pool: dict[str, Any] = {"engine": "simulated", "simulated": simulated}
    if slots is not None:
        pool |= {"slots": slots, "swap": {"min_stay_s": 0.0}}
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


class Running:
    """A pool by a config."""

    def __init__(self, first: Config) -> None:
        watch = PoolMetrics()
        self.pool = Pool("p")
        self.count = itertools.count()
        self.assembly = PoolBuilder(first, "p", self.pool, watch)
        self.pool.start()

    async def reload(self, config: Config) -> None:
        """Go on by another config, until all that goes by it has gone."""
        await self.assembly.reload(config)
        async with asyncio.timeout(60):
            await self.assembly.settled()

    async def ask(self, expert: str, tokens: int = 4) -> str:
        body = orjson.dumps({"prompt": "x", "max_tokens": tokens})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        call = Call("/v1/completions", expert, f"r{next(self.count)}", 10_000, False, "g", 1)
        try:
            await self.pool.run(call, body, send)
        except CoeError as error:
            return error.code
        return "ok" if f"{expert}:".encode() in sent[-1]["body"] else repr(sent)


@pytest.mark.parametrize("slots", [None, 1, 2])
async def test_reload_adds_and_removes_experts(slots: int | None) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    # One runs, one is asked for, one is new.
    with held_answers(limit=5) as gate:
        long = asyncio.create_task(running.ask("c", 5))
        await until(lambda: running.pool.snapshot().queues["c"].running == 1, "c runs")
        waiting = asyncio.create_task(running.ask("b")) if slots == 1 else None
        await asyncio.sleep(0)
        reload = asyncio.create_task(running.reload(config("ad", slots)))
        await until(lambda: "c" not in running.pool.experts, "it goes")
        gate.open()
        await reload
        assert await long == "ok", "who ran was not let end"
    if waiting is not None:
        assert await waiting in ("model_not_found", "ok")
    assert set(running.pool.snapshot().experts) == {"a", "d"}
    assert [await running.ask(name) for name in "ad"] == ["ok"] * 2
    with pytest.raises(UnknownModelError):
        await running.pool.operate("load", "b")
    assert running.pool.unhealthy() is None
    await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 1])
async def test_reload_with_a_changed_expert_restarts_it(slots: int | None) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    await running.reload(config("abc", slots, b="n"))
    assert running.pool.details()["b"].get("host_bytes", 0) == 0 or slots is None
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 1, 2])
async def test_reload_changed_expert_raises_retryable_and_removed_raises_not_found(
    slots: int | None,
) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    # Its running request keeps the old one of that name there for a while.
    with held_answers(limit=5) as gate:
        long = asyncio.create_task(running.ask("b", 5))
        await until(lambda: running.pool.snapshot().queues["b"].running == 1, "b runs")
        reload = asyncio.create_task(running.reload(config("ab", slots, b="n")))
        await until(lambda: "b" not in running.pool.experts, "it goes")
        assert await running.ask("b") == "engine_restarting"
        await until(lambda: "c" not in running.pool.experts, "it goes")
        assert await running.ask("c") == "model_not_found"
        gate.open()
        assert await long == "ok"
        await reload
    assert [await running.ask(name) for name in "abc"] == ["ok", "ok", "model_not_found"]
    await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 1, 2])
@pytest.mark.parametrize("changed", ["abc", "bc"])
async def test_reload_that_changes_all_experts_keeps_the_number_of_slots(
    slots: int | None, changed: str
) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    async with asyncio.timeout(60):
        await running.reload(config("abc", slots, **dict.fromkeys(changed, "n")))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    assert len(running.pool.shared) == (slots or 0)
    assert running.pool.unhealthy() is None
    await running.pool.stop(1)


async def test_reload_to_fewer_experts_than_slots_and_back_restores_all_slots() -> None:
    running = Running(config("abc", 2))
    await running.reload(config("a", 2))
    assert len(running.pool.shared) == 1
    await running.reload(config("abc", 2))
    assert len(running.pool.shared) == 2
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    await running.pool.stop(1)


@pytest.mark.parametrize("stay", ["bd", "acd", "f", "bdfg"])
async def test_reload_that_removes_all_units_of_a_shared_slot_stops_its_engine(stay: str) -> None:
    running = Running(config("abcdef", 2))
    assert [await running.ask(name) for name in "abcdef"] == ["ok"] * 6
    under_way = [asyncio.create_task(running.ask(name, 30)) for name in "ae"]
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await running.reload(config(stay, 2))
    assert await asyncio.gather(*under_way) in (
        ["ok", "ok"],
        ["model_not_found", "ok"],
        ["ok", "model_not_found"],
        ["model_not_found", "model_not_found"],
    )
    assert set(running.pool.snapshot().experts) == set(stay)
    assert [await running.ask(name) for name in stay] == ["ok"] * len(stay)
    assert running.pool.unhealthy() is None
    await running.pool.stop(1)


async def test_reload_with_another_swap_policy_applies_it() -> None:
    running = Running(config("abc", 1))
    other = config("abc", 1)
    swap = other.pools["p"].swap.model_copy(update={"max_wait_s": 7.0, "running": "preempt"})
    pool = other.pools["p"].model_copy(update={"swap": swap})
    await running.reload(other.model_copy(update={"pools": {"p": pool}}))
    policy = running.pool.shared[0].policy
    assert (policy.max_wait_s, policy.preempt) == (7.0, True)
    await running.pool.stop(1)


def steered(folder: Path, names: str, slots: int | None = None) -> Config:
    """Experts a and b are full; a1 and a2 are virtual experts of a. Profiles are any files."""
    experts = {
        name: {"base": name[0], "profile": str(folder / name)} if name[1:] else {"model": "m"}
        for name in names.split()
    }
    for name in experts:
        if not (folder / name).exists():
            (folder / name).write_text(name)
    simulated = {"decode_ms": 10, "tokens": 4, "fill_s": 0.02, "swap_s": 0.01}
    pool = {"engine": "simulated", "simulated": simulated, "swap": {"min_stay_s": 0.0}}
    if slots is not None:
        pool["slots"] = slots
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


@pytest.mark.parametrize("slots", [None, 1, 2])
async def test_virtual_experts_share_a_slot_with_their_base(
    tmp_path: Path, slots: int | None
) -> None:
    running = Running(steered(tmp_path, "a b a1 a2", slots))
    try:
        for _ in range(2):
            assert [await running.ask(name) for name in ("a1", "b", "a2", "a")] == ["ok"] * 4
        counts = running.pool.snapshot().experts
        assert len({counts[name].slot for name in ("a", "a1", "a2")}) == 1
        assert len({count.slot for count in counts.values()}) == (1 if slots == 1 else 2)
        methods = {method for _, method, _ in running.pool.swap_counts()}
        assert methods == ({"steer", "inplace"} if slots == 1 else {"steer"})
    finally:
        await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 1])
async def test_reload_adds_removes_and_changes_virtual_experts(
    tmp_path: Path, slots: int | None
) -> None:
    running = Running(steered(tmp_path, "a b", slots))
    try:
        assert await running.ask("a") == "ok"
        await running.reload(steered(tmp_path, "a b a1 a2", slots))
        assert [await running.ask(name) for name in ("a1", "a2", "a", "b")] == ["ok"] * 4
        # The same config, another file: nobody else has to go for it.
        (tmp_path / "a1").write_text("other")
        await running.reload(steered(tmp_path, "a b a1 a2", slots))
        details = running.pool.details()
        assert details["a1"]["host_bytes"] == 0
        assert details["a2"]["host_bytes"] > 0
        assert [await running.ask(name) for name in ("a1", "a2", "a")] == ["ok"] * 3
        # While one runs; then its base with it.
        await running.reload(steered(tmp_path, "a b a2", slots))
        with pytest.raises(UnknownModelError):
            await running.pool.operate("load", "a1")
        assert [await running.ask(name) for name in ("a2", "a")] == ["ok"] * 2
        await running.reload(steered(tmp_path, "b", slots))
        assert set(running.pool.snapshot().experts) == {"b"}
        assert await running.ask("b") == "ok"
        assert running.pool.unhealthy() is None
    finally:
        await running.pool.stop(1)


async def test_reload_virtual_expert_without_a_steerable_engine_restarts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the engine is started anew, once, for the base, and then takes it on."""
    first: list[Any] = []

    class Made(SimulatedEngine):
        @property
        def swappable_experts(self) -> frozenset[str]:
            first[:] = first or [self]
            return super().swappable_experts - ({"a2"} if first[0] is self else set())

    monkeypatch.setattr("service.pool.engine_factory.SimulatedEngine", Made)
    running = Running(steered(tmp_path, "a a1"))
    try:
        assert [await running.ask(name) for name in ("a", "a1")] == ["ok"] * 2
        await running.reload(steered(tmp_path, "a a1 a2"))
        assert [await running.ask(name) for name in ("a2", "a", "a1", "a2")] == ["ok"] * 4
        counted = running.pool.swap_counts()
        respawned = {unit: n for (unit, method, _), n in counted.items() if method == "respawn"}
        assert respawned == {"a2": 1}
        assert running.pool.unhealthy() is None
    finally:
        await running.pool.stop(1)


GATE = "model.layers.{}.block_sparse_moe.gate.weight"
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "vocab_size": 32,
}


def on_a_gpu(root: Path, names: str, method: str = "auto", **top_k: int) -> Config:
    """Experts a and b are mixtures; a1 and a2 are virtual experts of a, with real files."""
    experts: dict[str, Any] = {}
    for name in names.split():
        if not name[1:]:
            if not (root / name).exists():  # written anew it would be another one
                gates(root / name, MIXTRAL, GATE)
            experts[name] = {"model": str(root / name)}
            continue
        shape = moe_shape(root / name[0])
        assert shape is not None
        layer = LayerSteering.of(4, top_k=top_k.get(name, 1))
        write_profile(SteeringProfile(shape, {1: layer}), root / f"{name}.safetensors")
        experts[name] = {"base": name[0], "profile": str(root / f"{name}.safetensors")}
    pool = {"gpus": 1, "slots": 1, "swap": {"method": method}}
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


@pytest.fixture
def torch_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the installed torch pass for one that was built for CUDA."""
    cuda = TorchBuild("2.13.0", "cuda 13.0")
    monkeypatch.setattr("service.pool.engine_factory.torch_build", lambda: cuda)


@pytest.mark.usefixtures("torch_for_gpus")
async def test_engine_leaves_room_for_a_layer_of_another_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    gpu_bytes = 1024**3
    monkeypatch.setattr("service.pool.engine_factory.largest_gpu_bytes", lambda: gpu_bytes)
    experts: Tensors = {"model.layers.0.mlp.experts.up_proj": ("BF16", (4, 512, 1024))}
    for name in "ab":
        make_model(tmp_path / name, tensors={**TENSORS, **experts})
    pool = {"gpus": 1, "slots": 1, "swap": {"method": "inplace"}}
    named = {name: {"model": str(tmp_path / name)} for name in "abc"}
    # The files of an expert that is not there yet tell nothing.
    config = Config.model_validate({"experts": named, "pools": {"p": pool}})
    built = PoolBuilder(config, "p", Pool("p"), PoolMetrics())
    lazy: Any = built.engines.shared_engine("a", 0)
    engine = await asyncio.to_thread(lazy.make)
    layer_bytes = LAYER_COPIES * 2 * 4 * 512 * 1024
    assert engine._gpu_share.layer_bytes == layer_bytes
    assert engine._gpu_share.utilization == pytest.approx(0.92 - layer_bytes / gpu_bytes, abs=2e-4)
    (kept,) = built.engines.reserved_gpu_shares()[0]
    assert kept.reserved_bytes(gpu_bytes) == pytest.approx(0.92 * gpu_bytes, rel=1e-3)
    await built.stop(0)


async def test_gpu_pool_is_refused_with_a_torch_that_sees_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = TorchBuild("2.13.0+cpu", "")
    monkeypatch.setattr("service.pool.engine_factory.torch_build", lambda: cpu)
    assembly = PoolBuilder(on_a_gpu(tmp_path, "a b"), "p", Pool("p"), PoolMetrics())
    with pytest.raises(ConfigError, match=r"pools\.p\.gpus: 1, but .*make setup GPU=1"):
        assembly.engines.shared_engine("a").make()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_for_gpus")
async def test_gpu_pool_engines_and_virtual_experts_get_their_slots(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from service.engine.vllm.swapping_engine import SwappingVllmEngine

    pool = Pool("p")
    assembly = PoolBuilder(on_a_gpu(tmp_path, "a b a1"), "p", pool, PoolMetrics())

    def engine_for(unit: str) -> Any:
        return assembly.engines.shared_engine(unit).make()  # type: ignore[attr-defined]

    # Weights are exchanged by another engine, gates in this one.
    steered, plain = engine_for("a"), engine_for("b")
    assert isinstance(steered, SwappingVllmEngine)
    assert not isinstance(plain, SwappingVllmEngine)
    steered._places = 2  # as it was started
    assert steered.swappable_experts == {"a", "a1"}
    assert plain.swappable_experts == {"b"}
    # Of those that come, it has what it can run; for the other it is started anew.
    await assembly.reload(on_a_gpu(tmp_path, "a b a1 a2 a3", a3=3))
    await assembly.settled()
    assert steered.swappable_experts == {"a", "a1", "a2"}
    again = engine_for("a")
    assert {name: weights.places for name, weights in again._weights.items()} == {
        "a": 0,
        "a1": 2,
        "a2": 2,
        "a3": 3,
    }
    # Nothing of an engine whose experts went is looked for.
    assembly.engines.set_config(on_a_gpu(tmp_path, "b"))
    assembly.engines.refresh(())
    assert steered.swappable_experts == {"a", "a1", "a2"}
    # What its engines would share goes with the pool.
    cache = assembly.engines.weight_cache()
    assert cache is not None
    assert cache is assembly.engines.weight_cache()
    assert cache.folder.is_dir()
    await assembly.stop(0)
    assert not cache.folder.is_dir()


async def test_shared_weights_bound_is_that_of_the_config(tmp_path: Path) -> None:
    config = on_a_gpu(tmp_path, "a b", "inplace")

    def bounded(amount: int) -> Config:
        pool = config.pools["p"]
        swap = pool.swap.model_copy(update={"host_bytes": amount})
        changed = {"p": pool.model_copy(update={"swap": swap})}
        return config.model_copy(update={"pools": changed})

    assembly = PoolBuilder(bounded(1000), "p", Pool("p"), PoolMetrics())
    cache = assembly.engines.weight_cache()
    assert cache is not None
    assert cache.bound_bytes == 1000
    await assembly.reload(bounded(2000))
    await assembly.settled()
    assert cache.bound_bytes == 2000
    await assembly.stop(0)


@pytest.mark.usefixtures("torch_for_gpus")
async def test_gpu_pool_engines_with_in_place_swap_get_their_slots(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    first = on_a_gpu(tmp_path, "a b a1", "inplace")
    assembly = PoolBuilder(first, "p", Pool("p"), PoolMetrics())
    engine: Any = assembly.engines.shared_engine("a").make()  # type: ignore[attr-defined]
    engine._places = 2
    assert engine.swappable_experts == {"a", "a1", "b"}
    # Whose first expert went.
    assembly.engines.set_config(on_a_gpu(tmp_path, "b c", "inplace"))
    assembly.engines.refresh(())
    assert engine.swappable_experts == {"b", "c"}


def adapted(folder: Path, names: str, slots: int | None = None, **paths: str) -> Config:
    """Experts a and b are full; a1, a2, … are adapters of a, simulated with any files."""
    experts = {
        name: {"base": name[0], "adapter": str(folder / paths.get(name, name))}
        if name[1:]
        else {"model": "m"}
        for name in names.split()
    }
    for name in experts:
        (folder / paths.get(name, name)).mkdir(exist_ok=True)
    simulated = {"decode_ms": 10, "tokens": 4, "fill_s": 0.02, "swap_s": 0.01}
    pool: dict[str, Any] = {"engine": "simulated", "simulated": simulated}
    if slots is not None:
        pool |= {"slots": slots, "swap": {"min_stay_s": 0.0}}
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


def engine_of(running: Running, expert: str) -> Any:
    return running.pool.slot_of(expert).engine


async def test_reload_with_one_more_adapter_keeps_base_and_siblings_running(
    tmp_path: Path,
) -> None:
    running = Running(adapted(tmp_path, "a a1 b"))
    assert [await running.ask(name) for name in ("a", "a1", "b")] == ["ok"] * 3
    engines = {name: engine_of(running, name) for name in ("a", "b")}
    with held_answers(limit=5) as gate:
        under_way = [asyncio.create_task(running.ask(name, 5)) for name in ("a", "a1")]
        await until(lambda: gate.held == 2, "both run")
        await running.reload(adapted(tmp_path, "a a1 a2 a3 b"))
        assert not any(task.done() for task in under_way), "nobody was waited for"
        assert [await running.ask(name) for name in ("a2", "a3")] == ["ok"] * 2
        gate.open()
        assert await asyncio.gather(*under_way) == ["ok", "ok"]
    assert {name: engine_of(running, name) for name in ("a", "b")} == engines
    await running.pool.stop(1)


@pytest.mark.parametrize("names", ["a a2 b", "a b"])
async def test_reload_without_an_adapter_lets_its_requests_end_and_keeps_the_others(
    tmp_path: Path, names: str
) -> None:
    running = Running(adapted(tmp_path, "a a1 a2 b"))
    assert [await running.ask(name) for name in ("a", "a1", "a2")] == ["ok"] * 3
    engine = engine_of(running, "a")
    with held_answers(limit=5) as gate:
        under_way = asyncio.create_task(running.ask("a1", 5))
        await until(lambda: gate.held == 1, "it runs")
        await running.assembly.reload(adapted(tmp_path, names))
        assert not under_way.done()
        assert await running.ask("a1") == "model_not_found"
        assert "a1" not in running.pool.snapshot().experts
        assert await running.ask("a") == "ok"
        gate.open()
        assert await under_way == "ok"
    await running.assembly.settled()
    assert engine_of(running, "a") is engine
    assert "a1" not in engine._loaded
    # The engine still takes adapters, also after the last one went.
    await running.reload(adapted(tmp_path, names + " a4"))
    assert await running.ask("a4") == "ok"
    assert engine_of(running, "a") is engine
    await running.pool.stop(1)


async def test_reload_of_a_changed_adapter_replaces_only_it(tmp_path: Path) -> None:
    running = Running(adapted(tmp_path, "a a1 a2"))
    assert [await running.ask(name) for name in ("a", "a1", "a2")] == ["ok"] * 3
    engine = engine_of(running, "a")
    with held_answers(limit=5) as gate:
        under_way = asyncio.create_task(running.ask("a1", 5))
        await until(lambda: gate.held == 1, "it runs")
        await running.assembly.reload(adapted(tmp_path, "a a1 a2", a1="other"))
        assert await running.ask("a1") == "engine_restarting", "it comes again: ask again"
        assert await running.ask("a2") == "ok"
        gate.open()
        assert await under_way == "ok"
    await running.assembly.settled()
    assert await running.ask("a1") == "ok"
    assert engine_of(running, "a") is engine
    await running.pool.stop(1)


async def test_reload_with_the_first_adapter_restarts_the_engine_and_logs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(adapted(tmp_path, "a b"))
    assert await running.ask("a") == "ok"
    engines = [engine_of(running, name) for name in "ab"]
    await running.reload(adapted(tmp_path, "a a1 b"))
    assert [await running.ask(name) for name in ("a", "a1", "b")] == ["ok"] * 3
    assert engine_of(running, "a") is not engines[0]
    assert engine_of(running, "b") is engines[1]
    assert "the engine of a starts again: it was started without adapters" in caplog.text
    await running.pool.stop(1)


async def test_reload_of_an_adapter_in_a_shared_slot_restarts_its_unit(
    tmp_path: Path,
) -> None:
    running = Running(adapted(tmp_path, "a a1 b", 1))
    assert [await running.ask(name) for name in ("a", "a1", "b")] == ["ok"] * 3
    await running.reload(adapted(tmp_path, "a a1 a2 b", 1))
    assert [await running.ask(name) for name in ("a", "a1", "a2", "b")] == ["ok"] * 4
    await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 2])
async def test_reload_during_another_that_still_drains_applies_at_once(
    slots: int | None,
) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    with held_answers(limit=5) as gate:
        under_way = asyncio.create_task(running.ask("b", 5))
        await until(lambda: gate.held == 1, "it runs")
        async with asyncio.timeout(60):
            await running.assembly.reload(config("ac", slots))
            await running.assembly.reload(config("acd", slots))
            # b comes again, though it has not gone yet.
            await running.assembly.reload(config("abcd", slots))
        assert not under_way.done()
        assert await running.ask("d") == "ok"
        assert await running.ask("b") == "engine_restarting"
        gate.open()
        assert await under_way == "ok"
    await running.assembly.settled()
    assert [await running.ask(name) for name in "abcd"] == ["ok"] * 4
    await running.pool.stop(1)


async def test_reload_from_adapter_to_full_weights_of_that_name_and_back(tmp_path: Path) -> None:
    running = Running(adapted(tmp_path, "a a1 a2"))
    assert await running.ask("a1") == "ok"
    full = adapted(tmp_path, "a a1 a2").model_dump()
    full["experts"]["a1"] = {"model": "m"}
    await running.reload(Config.model_validate(full))
    assert [await running.ask(name) for name in ("a", "a1", "a2")] == ["ok"] * 3
    assert engine_of(running, "a1") is not engine_of(running, "a")
    await running.reload(adapted(tmp_path, "a a1 a2"))
    assert [await running.ask(name) for name in ("a", "a1", "a2")] == ["ok"] * 3
    assert engine_of(running, "a1") is engine_of(running, "a")
    await running.pool.stop(1)


@pytest.mark.parametrize(
    ("pool", "devices", "share"),
    [
        ({"gpus": 1}, [(), ()], 0.46),
        ({"gpus": 0.5}, [(), ()], 0.23),
        ({"gpus": 2}, [(0,), (1,)], 0.92),
        ({"gpus": 1, "slots": 1}, [()], 0.92),
        ({"gpus": 1, "slots": 1, "swap": {"method": "sleep"}}, [()], 0.88),
        ({"gpus": 4, "vllm": {"tensor_parallel_size": 2}}, [(0, 1), (2, 3)], 0.92),
        ({"gpus": 1, "vllm": {"kv_cache_bytes": "3GiB"}}, [(), ()], 0.2),
        ({"gpus": 1, "vllm": {"args": {"gpu_memory_utilization": 0.3}}}, [(), ()], 0.3),
        ({"gpus": 0}, [None, None], None),
    ],
)
@pytest.mark.usefixtures("torch_for_gpus")
async def test_engines_get_the_share_of_the_gpus_that_the_memory_plan_says(
    pool: dict[str, Any],
    devices: list[tuple[int, ...] | None],
    share: float | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("service.pool.engine_factory.largest_gpu_bytes", lambda: 25 * 1024**3)
    experts = on_a_gpu(tmp_path, "a b").model_dump(include={"experts"}, exclude_unset=True)
    config = Config.model_validate({**experts, "pools": {"p": pool}})
    built = PoolBuilder(config, "p", Pool("p"), PoolMetrics())
    found: list[Any] = []
    for slot, name in zip(built.pool.slots, "ab", strict=False):
        build: Any = slot.build if isinstance(slot, DedicatedSlot) else None
        lazy = build() if build else slot._build_for(name)  # type: ignore[attr-defined]
        engine = await asyncio.to_thread(lazy.make)
        found.append((engine._build("b") if hasattr(engine, "_build") else engine)._gpu_share)
    assert [one and one.device_ids for one in found] == devices
    for one in found:
        assert (one and one.utilization) == (share and pytest.approx(share, abs=2e-4))
    reserved: dict[int, list[float]] = {}
    for one in filter(None, found):
        for gpu in one.device_ids or range(config.pools["p"].vllm.engine_gpus):
            reserved.setdefault(gpu, []).append(one.utilization)
    kept = built.engines.reserved_gpu_shares()
    assert {gpu: [one.utilization for one in shares] for gpu, shares in kept.items()} == reserved
    assert all(sum(shares) <= 0.92 + 1e-9 for shares in reserved.values())
    await built.stop(0)
