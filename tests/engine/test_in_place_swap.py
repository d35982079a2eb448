"""In-place swaps in vLLM: outputs are exactly those of each expert alone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.engine.engine_interface import EngineReport
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import Canary, Weights
from service.errors import EngineDeadError, ExpertFailedError
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.base_slot import LeaseRevokedError
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.types import Residency
from tests.support.engine.real_engines import (
    ADAPTERS,
    BASE,
    DEMO,
    ENVIRONMENT,
    ON_ONE_ENGINE,
    OPTIONS,
    Swapping,
    ask,
    ask_one,
    core_of,
    demo,
    kill,
    metric_values,
)
from tests.support.engine.spoiled_weights import OF_ADAPTERS, WHY, spoiled_weights
from tests.support.polling import until

pytestmark = ON_ONE_ENGINE


class Stage:
    """The module's engine, what its experts said at first, and their canaries."""

    def __init__(self, weights: dict[str, Weights]) -> None:
        self.weights = weights
        self.canaries: dict[str, Canary] = {}
        self.engine = Swapping("base", weights, self.canaries)
        self.report: EngineReport | None = None
        self.said: dict[str, str] = {}

    async def run(self, expert: str) -> None:
        assert (await self.engine.swap_in(expert)).ok


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    os.environ.update(ENVIRONMENT)
    folder = tmp_path_factory.mktemp("adapters")
    stage = Stage({**demo(), **spoiled_weights(folder)})
    stage.report = await stage.engine.start()
    yield stage
    await stage.engine.stop()


async def test_swap_outputs_are_unchanged_by_swaps_and_concurrent_loads(stage: Stage) -> None:
    engine, answers = stage.engine, stage.said
    answers["base"] = await ask(engine, "base")
    alone = await ask_one(engine, "base", tokens=200)
    concurrent = 0
    for name in DEMO[1:]:
        # The expert is loaded while the base generates: neither must disturb the other.
        beside = asyncio.create_task(ask_one(engine, "base", tokens=200))
        filled = await engine.load_to_host(name)
        concurrent += not beside.done()
        assert filled.host_bytes > 400 * 1024**2
        assert await beside == alone
    # A load may take longer than an answer on a busy machine, but not every time.
    assert concurrent, "every answer ended before the load beside it: nothing was shown"
    for name in DEMO[1:]:
        await stage.run(name)
        answers[name] = await ask(engine, name)
    assert len(set(answers.values())) == len(DEMO), "experts that say the same prove nothing"
    chance = random.Random(1)
    running = DEMO[-1]
    for _ in range(20):
        running = chance.choice([name for name in DEMO if name != running])
        await stage.run(running)
        assert answers[running].startswith(await ask_one(engine, running, tokens=8))
    for name in DEMO:
        await stage.run(name)
        assert await ask(engine, name) == answers[name]


async def test_swap_metrics_are_those_of_the_running_expert(stage: Stage) -> None:
    engine = stage.engine
    for name in DEMO:
        await stage.run(name)
        before = await metric_values(engine.metrics)
        await ask(engine, name, tokens=5)
        # vLLM tells of a request after its answer has gone out.
        counted = partial(_counted, engine, name, before, 15)
        await until(counted, "three answers were counted")
        after = await metric_values(engine.metrics)
        grown = {key[1] for key, value in after.items() if value > before.get(key, 0.0)}
        assert grown == {name}
        assert after["vllm:generation_tokens_total", name] > 0
        assert after["vllm:num_requests_running", name] == 0
        prefill = after["coe_prefill_seconds_sum", name] - before["coe_prefill_seconds_sum", name]
        decode = after["coe_decode_seconds_sum", name] - before["coe_decode_seconds_sum", name]
        assert 0 < prefill < 60
        assert 0 < decode < 60


async def _counted(
    engine: Swapping, name: str, before: dict[tuple[str, str], float], tokens: int
) -> bool:
    key = "coe_tokens_total", name
    return (await metric_values(engine.metrics))[key] - before[key] == tokens


@pytest.mark.parametrize("name", WHY)
async def test_swap_unusable_weights_fail_their_expert_only(stage: Stage, name: str) -> None:
    await stage.run("base")
    beside = asyncio.create_task(ask_one(stage.engine, "base"))
    with pytest.raises(ExpertFailedError, match=WHY[name]):
        await stage.engine.load_to_host(name)
    with pytest.raises(ExpertFailedError, match="not held"):
        await stage.engine.swap_in(name)
    assert stage.said["base"].startswith(await beside)
    assert stage.said["base"].startswith(await ask_one(stage.engine, "base", tokens=4))


async def test_swap_engine_started_with_a_merged_expert_holds_its_weights_once(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_TEST_API_KEY", "hidden")
    engine = Swapping("math", stage.weights, stage.canaries)
    await engine.start()
    try:
        # Merged as it was read, it says what it says when it is merged beside another; else its
        # canary would have refused it, too.
        assert await ask(engine, "math") == stage.said["math"]
        alone = await engine.memory()
        await engine.load_to_host("base")
        beside = await engine.memory()
        assert beside["resident_bytes"] > alone["resident_bytes"] + 300 * 1024**2
        assert (await engine.swap_in("base")).ok
        assert await ask(engine, "base") == stage.said["base"]
        assert (await engine.swap_in("math")).ok
        assert await ask(engine, "math") == stage.said["math"]
        names = await engine.worker_rpc("coe_environment")
        assert "COE_TEST_API_KEY" not in names
        assert "PATH" in names
    finally:
        await engine.stop()


@pytest.mark.parametrize("name", OF_ADAPTERS)
async def test_swap_engine_started_with_a_damaged_adapter_raises_the_reason(
    stage: Stage, name: str
) -> None:
    engine = Swapping(name, stage.weights, stage.canaries)
    with pytest.raises(ExpertFailedError, match=WHY[name]):
        await engine.start()
    await engine.stop()


async def test_swap_evicted_expert_can_be_loaded_again(stage: Stage) -> None:
    engine = stage.engine
    await stage.run("base")
    before = await engine.memory()
    await engine.evict("code")
    after = await engine.memory()
    assert after["resident_bytes"] < before["resident_bytes"] - 300 * 1024**2
    assert after["host_bytes"] < before["host_bytes"]
    with pytest.raises(ExpertFailedError):
        await engine.swap_in("code")
    # A swap that failed leaves the engine as it was.
    assert await ask(engine, "base") == stage.said["base"]
    await engine.evict("base")  # it runs: nothing happens
    assert await ask(engine, "base") == stage.said["base"]
    await engine.load_to_host("code")
    await stage.run("code")
    assert await ask(engine, "code") == stage.said["code"]


async def test_swap_weight_probe_detects_changed_weights(stage: Stage) -> None:
    engine = stage.engine
    await stage.run("base")
    await engine.worker_rpc("coe_spoil", "math")
    assert not (await engine.swap_in("math")).ok
    await stage.run("base")
    await engine.evict("math")
    await engine.load_to_host("math")
    await stage.run("math")
    assert await ask(engine, "math") == stage.said["math"]


@pytest.mark.parametrize(("how", "why"), [("told", "are free"), ("refused", "memory")])
async def test_swap_out_of_memory_during_a_load_affects_nobody_else(
    stage: Stage, how: str, why: str
) -> None:
    engine = stage.engine
    await stage.run("base")
    await engine.evict("code")
    before = await engine.memory()
    await engine.worker_rpc("coe_no_memory", how)
    try:
        beside = asyncio.create_task(ask_one(engine, "base"))
        with pytest.raises(ExpertFailedError, match=why):
            await engine.load_to_host("code")
        assert stage.said["base"].startswith(await beside)
    finally:
        await engine.worker_rpc("coe_no_memory", "not")
    # What the failed fill had taken is given back.
    after = await engine.memory()
    assert after["resident_bytes"] < before["resident_bytes"] + 50 * 1024**2
    assert (await engine.load_to_host("code")).host_bytes > 400 * 1024**2
    await stage.run("code")
    assert stage.said["code"].startswith(await ask_one(engine, "code"))


async def test_swap_canary_detects_another_expert_s_weights(stage: Stage) -> None:
    engine = stage.engine
    await stage.run("base")
    assert await engine.check_canary("base")
    kept = stage.canaries["base"]
    stage.canaries["base"] = replace(kept, answer=stage.canaries["math"].answer)
    assert not await engine.check_canary("base")
    # What was said by other files is nothing to hold these against.
    stage.canaries["base"] = replace(kept, version="older", answer=stage.canaries["math"].answer)
    assert await engine.check_canary("base")
    assert stage.canaries["base"].version == kept.version
    stage.canaries["base"] = kept


class _Started(Swapping):
    """The module's engine, handed to a slot that believes it starts it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__("base", stage.weights, stage.canaries)
        self.__dict__.update(stage.engine.__dict__)
        assert stage.report is not None
        self._told = stage.report

    async def start(self) -> EngineReport:
        return self._told


class _Lent(_Started):
    """The same, to be had back."""

    async def stop(self) -> None:
        pass


@asynccontextmanager
async def _slot(
    stage: Stage, kind: type[_Started] = _Started, *, preempt: bool = False
) -> AsyncIterator[tuple[SharedSlot, list[Any]]]:
    engines: list[Any] = []

    def build(first: str) -> Swapping:
        engine = kind(stage) if not engines else Swapping(first, demo(), stage.canaries)
        engines.append(engine)
        return engine

    slot = SharedSlot(
        tuple(Unit(name, (name,)) for name in DEMO),
        build,
        SwapPolicy(0.0, max_wait_s=2.0 if preempt else 30.0, prefetch=False, preempt=preempt),
        capacity=8,
        max_waiting=8,
        start_guess_s=30.0,
        guess=UnitState(host_bytes=1024**3, fill_s=2.0, swap_s=0.05),
        changed=lambda: None,
    )
    supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
    try:
        yield slot, engines
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)


async def _through(slot: SharedSlot, expert: str) -> str:
    async with slot.lease(expert) as lease:
        return await ask(lease.engine, expert)


async def test_swap_preempted_request_is_answered_as_if_alone(stage: Stage) -> None:
    await stage.run("base")
    alone = await ask_one(stage.engine, "base", tokens=128)
    put_back: list[str] = []

    async def through(slot: SharedSlot, expert: str, tokens: int) -> str:
        again: LeaseRevokedError | None = None
        while True:
            try:
                async with slot.lease(expert, again=again) as lease:
                    return await ask_one(lease.engine, expert, tokens=tokens)
            except LeaseRevokedError as back:
                again = back
                put_back.append(expert)

    async with _slot(stage, _Lent, preempt=True) as (slot, engines):
        assert stage.said["intents"].startswith(await through(slot, "intents", 4))
        first = asyncio.create_task(through(slot, "base", 128))
        running = slot.queues
        await until(lambda: running()["base"].running == 1, "base runs")
        await asyncio.sleep(0.5)  # into the answer
        assert stage.said["intents"].startswith(await through(slot, "intents", 4))
        assert put_back == ["base"]
        assert not first.done()
        assert await first == alone
        assert await engines[0].in_flight() == 0
    await stage.run("base")


async def test_swap_engine_core_killed_during_load_or_swap_is_replaced(stage: Stage) -> None:
    await stage.run("base")
    for name in DEMO[1:]:
        await stage.engine.evict(name)
    async with _slot(stage) as (slot, engines):
        assert await _through(slot, "base") == stage.said["base"]
        waiting = asyncio.create_task(_through(slot, "intents"))
        loading = Residency.LOADING
        await until(lambda: slot.states()["intents"].state is loading, "the fill began")
        await asyncio.sleep(0.2)  # into the fill
        kill(engines[0])
        # Who waited is answered by the next engine, and by the right expert.
        assert await waiting == stage.said["intents"]
        assert len(engines) == 2
        assert await _through(slot, "base") == stage.said["base"]
        dead = core_of(engines[1])
        engines[1].die_at = "coe_swap_in"
        assert await _through(slot, "intents") == stage.said["intents"]
        assert len(engines) == 3
        assert core_of(engines[2]) != dead
        counts = slot.swap_counts().items()
        assert sum(n for (unit, how, _), n in counts if (unit, how) == ("intents", "inplace")) == 2


async def test_swapped_in_expert_equals_an_engine_started_with_it(
    stage: Stage, tmp_path: Path
) -> None:
    """Last: it needs an engine of its own, and by now the module's is dead."""
    with pytest.raises(EngineDeadError):
        await ask(stage.engine, "base")
    folder = tmp_path / "merged"
    await asyncio.to_thread(_merge, folder, "intents")
    metrics = stage.engine.metrics
    before = await metric_values(metrics)
    model = VllmModel("fresh", str(folder), {})
    engine = VllmEngine(model, OPTIONS, on_cpu=True, observer=metrics)
    try:
        await engine.start()
        assert await ask(engine, "fresh") == stage.said["intents"]
        # A second engine in the process has metrics of its own, and takes nobody's away.
        after = await metric_values(metrics)
        assert before == {key: value for key, value in after.items() if key[1] != "fresh"}
        assert after["vllm:generation_tokens_total", "fresh"] == 36
        assert after["coe_tokens_total", "fresh"] == 36
        # A stop is no death: nobody waits for ever, and nothing is logged as an error.
        logged: list[str] = []
        listener = logging.Handler(logging.ERROR)
        listener.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("vllm").addHandler(listener)
        running = asyncio.create_task(ask_one(engine, "fresh", tokens=450))
        await until(engine.in_flight, "a request under way", 30)
        await engine.stop()
        with pytest.raises(EngineDeadError):
            await running
        logging.getLogger("vllm").removeHandler(listener)
        assert not logged
    finally:
        await engine.stop()


def _merge(folder: Path, adapter: str) -> None:
    """The base's folder with an adapter added to its weights, by arithmetic of our own."""
    from safetensors.torch import load_file, save_file

    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BASE, folder, ignore=ignore)
    weights = load_file(f"{BASE}/model.safetensors")
    config = json.loads((ADAPTERS / adapter / "adapter_config.json").read_text())
    added = load_file(str(ADAPTERS / adapter / "adapter_model.safetensors"))
    for key in [key for key in added if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        product = added[key.replace("lora_A", "lora_B")] @ added[key]
        weights[name] = weights[name] + config["lora_alpha"] / config["r"] * product
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
