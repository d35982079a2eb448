"""Swap times that a slot reports, compared with the times that its swaps then take."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, PoolView
from service.config import SimulatedOptions
from service.engine.engine_interface import EngineReport, LoadResult, SwapResult
from service.engine.simulated_engine import SimulatedEngine
from service.engine.sleeping_engines import SleepingEngines
from service.errors import CoeError, ExpertFailedError
from service.pool.pool import Pool
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.types import Residency
from tests.support.fake_clock_loop import FastTime
from tests.support.polling import until
from tests.support.shared_slot_simulation import on_clock

# Guesses that are wrong by far: nothing that is told may rest on them once it was measured.
GUESS = UnitState(host_bytes=10, fill_s=5.0, swap_s=0.05)
START_GUESS_S = 3.0
# What a look of the slot may come late, there and for the drops before.
SLACK_S = 0.25


@dataclass(frozen=True)
class Costs:
    start_s: float
    stop_s: float
    fill_s: float
    swap_s: float


class CostlyEngine(SimulatedEngine):
    """Every unit has times of its own."""

    def __init__(self, unit: str, family: frozenset[str], costs: dict[str, Costs]) -> None:
        super().__init__(tuple(costs), SimulatedOptions())
        self.unit = unit
        self.family = family
        self.costs = costs
        self.swaps_to: list[str] = []

    @property
    def swappable_experts(self) -> frozenset[str]:
        return self.family

    async def start(self) -> EngineReport:
        await asyncio.sleep(self.costs[self.unit].start_s)
        return await super().start()

    async def load_to_host(self, expert: str) -> LoadResult:
        await asyncio.sleep(self.costs[expert].fill_s)
        await self.load(expert)
        return LoadResult(10, self.costs[expert].fill_s)

    async def swap_in(self, expert: str) -> SwapResult:
        if expert not in self._loaded:
            raise ExpertFailedError("not held")
        await asyncio.sleep(self.costs[expert].swap_s)
        return SwapResult(self.costs[expert].swap_s, ok=True)

    async def sleep(self) -> None:
        """For an engine each: it takes nothing."""

    async def wake(self) -> None:
        await asyncio.sleep(self.costs[self.unit].swap_s)

    async def stop(self) -> None:
        if self._dead is None:
            await asyncio.sleep(self.costs[self.unit].stop_s)
        await super().stop()


def _slot(
    names: list[str],
    families: list[frozenset[str]],
    costs: dict[str, Costs],
    *,
    bound: int | None,
    apart: bool,
) -> tuple[Pool, SharedSlot]:
    pool = Pool("p")
    slot = SharedSlot(
        [Unit(name, (name,), size_bytes=10) for name in names],
        lambda unit: CostlyEngine(unit, next(f for f in families if unit in f), costs),
        SwapPolicy(min_stay_s=0.0, max_wait_s=1000.0, host_bytes=bound, prefetch=False),
        capacity=4,
        max_waiting=9,
        start_guess_s=START_GUESS_S,
        guess=GUESS,
        changed=pool.changed,
        apart=apart,
    )
    pool.add(slot)
    return pool, slot


async def _visit(slot: SharedSlot, expert: str) -> float:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with slot.lease(expert):
        return loop.time() - began_s


def _close(told_s: float, real_s: float) -> bool:
    return abs(told_s - real_s) <= SLACK_S + 0.1 * real_s


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 10, 20, 1000]), st.booleans())
def test_estimates_of_every_unit_equal_the_time_its_swap_takes(
    seed: int, bound: int | None, one_family: bool
) -> None:
    chance = random.Random(seed)
    names = [f"u{i}" for i in range(chance.randint(2, 5))]
    costs = {
        name: Costs(
            chance.uniform(1, 40), chance.uniform(0, 5), chance.uniform(0.1, 9), chance.random()
        )
        for name in names
    }
    split = chance.randint(1, len(names))
    halves = [frozenset(names[:split]), frozenset(names[split:])]
    families = [frozenset(names)] if one_family else halves

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            pool, slot = _slot(names, families, costs, bound=bound, apart=not one_family)
            pool.start()
            # Each was started, filled and swapped in wherever it can be.
            for item, other in itertools.permutations(names, 2):
                await _visit(slot, item)
                await _visit(slot, other)
            for _ in range(8):
                running = slot.running_unit
                name = chance.choice([item for item in names if item != running])
                state = pool.snapshot().experts[name]
                there_s = await _visit(slot, name)
                assert _close(state.eta_s, there_s), (name, state, there_s)
                # There and back without what is fetched beside the running unit.
                if state.state is Residency.DISK and state.swap_s > 1.0:
                    back_s = await _visit(slot, running)
                    assert _close(2 * state.swap_s, there_s + back_s), (name, state, back_s)
            await pool.stop(0)

    asyncio.run(whole())


def test_estimates_during_an_engine_start_count_down_and_add_up() -> None:
    costs = {name: Costs(20.0, 2.0, 5.0, 0.1) for name in "ab"}

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            families = [frozenset("a"), frozenset("b")]
            pool, slot = _slot(["a", "b"], families, costs, bound=None, apart=True)
            pool.start()
            await asyncio.sleep(0.1)
            # Nothing was measured yet: the guess of a start counts for both.
            assert slot.states()["a"].eta_s == START_GUESS_S
            assert slot.states()["b"].eta_s == 2 * START_GUESS_S
            for name in "aba":
                await _visit(slot, name)
            waits = asyncio.create_task(_visit(slot, "b"))
            await asyncio.sleep(8.0)
            states = slot.states()
            assert states["b"].state is Residency.LOADING
            assert states["b"].eta_s == pytest.approx(14.0, abs=1.0)
            assert states["a"].eta_s == pytest.approx(14.0 + 22.0, abs=1.5)
            await waits
            await pool.stop(0)

    asyncio.run(whole())


def test_displaced_work_of_a_unit_that_needs_another_engine_is_both_starts() -> None:
    costs = {"a": Costs(30.0, 2.0, 1.0, 0.1), "b": Costs(10.0, 4.0, 1.0, 0.1)}

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            families = [frozenset("a"), frozenset("b")]
            pool, slot = _slot(["a", "b"], families, costs, bound=None, apart=True)
            pool.start()
            for name in "aba":
                await _visit(slot, name)

            async def hold() -> None:
                async with slot.lease("a"):
                    await asyncio.sleep(1000)

            held = [asyncio.create_task(hold()) for _ in range(4)]
            await asyncio.sleep(0.1)
            view = PoolView(pool.boot, pool.snapshot(), 0.0, {})
            matrix = PoolStateTable({"a": 0, "b": 1}).to_matrix([view])
            # There: a ends, b starts. Back: b ends, a starts. For each of the four who run.
            assert matrix.eta[0, 1] == pytest.approx(2.0 + 10.0, abs=0.2)
            assert matrix.displaced[0, 1] == pytest.approx(4 * (12.0 + 34.0), rel=0.02)
            for item in held:
                item.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            await pool.stop(0)

    asyncio.run(whole())


def test_estimates_of_sleeping_engines_are_one_start_and_then_a_wake() -> None:
    costs = {name: Costs(20.0, 0.0, 0.0, 0.5) for name in "ab"}

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            from service.engine import sleeping_engines

            patch.setattr(
                sleeping_engines, "time", type("Clock", (), {"monotonic": lambda: clock.now_s})
            )
            units = {name: (name,) for name in "ab"}
            built: list[CostlyEngine] = []

            def build(name: str) -> CostlyEngine:
                built.append(CostlyEngine(name, frozenset("ab"), costs))
                return built[-1]

            slot = SharedSlot(
                [Unit(name, (name,)) for name in "ab"],
                lambda first: SleepingEngines(first, units, build, {}),
                SwapPolicy(min_stay_s=0.0, prefetch=False),
                capacity=4,
                max_waiting=9,
                start_guess_s=START_GUESS_S,
                guess=GUESS,
                changed=lambda: None,
            )
            task = asyncio.create_task(slot.supervise(asyncio.Lock()))
            await _visit(slot, "a")
            # Its engine has never been started: once it is to come, that is what it takes.
            await _visit(slot, "b")
            assert slot.details()["b"]["last_swap"]["swap_s"] == pytest.approx(20.0, abs=0.1)
            assert slot.states()["a"].eta_s == GUESS.swap_s
            await _visit(slot, "a")
            # The start is not taken for what waking it takes.
            assert slot.states()["b"].eta_s == GUESS.swap_s
            await _visit(slot, "b")
            for name in "ab":
                await _visit(slot, name)
            assert slot.states()["a"].eta_s == pytest.approx(0.5, abs=0.05)
            # One that died in its sleep is started: nor is that taken for a wake.
            built[0].kill("told to die")
            await _visit(slot, "a")
            assert slot.details()["a"]["last_swap"]["swap_s"] == pytest.approx(20.0, abs=0.1)
            await _visit(slot, "b")
            assert slot.states()["a"].eta_s == pytest.approx(0.5, abs=0.05)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(whole())


async def test_snapshot_unit_whose_start_fails_is_failed_and_holds_no_memory() -> None:
    class Refuses(CostlyEngine):
        async def start(self) -> EngineReport:
            raise ExpertFailedError("told not to start")

    costs = {"a": Costs(0.1, 0.0, 0.0, 0.0)}
    slot = SharedSlot(
        [Unit("a", ("a",))],
        lambda unit: Refuses(unit, frozenset("a"), costs),
        SwapPolicy(),
        capacity=1,
        max_waiting=1,
        start_guess_s=0.1,
        guess=GUESS,
        changed=lambda: None,
    )
    task = asyncio.create_task(slot.supervise(asyncio.Lock()))
    with pytest.raises(CoeError):
        async with slot.lease("a"):
            pass
    assert slot.states()["a"].eta_s == 0.0
    await until(lambda: slot.held_bytes() == 0, "its engine has ended", timeout_s=5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_estimates_of_slots_waiting_for_other_starts_add_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FastTime(asyncio.get_running_loop())
    on_clock(monkeypatch, lambda: clock.now_s)
    costs = {name: Costs(10.0, 0.0, 1.0, 0.1) for name in "abc"}
    pool = Pool("p")
    for name in "ab":
        pool.add(
            DedicatedSlot(
                (name,),
                partial(CostlyEngine, name, frozenset(name), costs),
                capacity=1,
                max_waiting=1,
                start_guess_s=10.0,
                changed=pool.changed,
            )
        )
    _, slot = _slot(["c"], [frozenset("c")], costs, bound=None, apart=True)
    pool.add(slot)
    slot._start_s = 10.0
    pool.start()
    began_s = clock.now_s
    up_s: dict[str, float] = {}
    collected: list[tuple[float, dict[str, float]]] = []
    while len(up_s) < 3:
        await asyncio.sleep(0.5)
        states = pool.snapshot().experts
        collected.append((clock.now_s, {name: state.eta_s for name, state in states.items()}))
        for name, state in states.items():
            if state.state is Residency.DEVICE:
                up_s.setdefault(name, clock.now_s)
    for at_s, etas in collected:
        for name, eta_s in etas.items():
            assert abs(max(0.0, up_s[name] - at_s) - eta_s) <= 1.5, (name, at_s - began_s, eta_s)
    assert sorted(round(at_s - began_s, -1) for at_s in up_s.values()) == [10, 20, 30]
    await pool.stop(0)
