"""A pool's bound on host memory, compared at every instant with what its engines really hold.

An engine holds memory from the begin of its start or load to the end of its eviction or stop. Both
take time, and a slot that underestimates the memory in use exceeds the bound just then.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import SimulatedOptions
from service.engine.engine_interface import EngineReport, EngineRequest, LoadResult
from service.engine.simulated_engine import SimulatedEngine
from service.errors import CoeError, ConflictError, EngineDeadError, ExpertFailedError
from service.pool.pool import Pool
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.base_slot import LeaseRevokedError
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from tests.support.fake_clock_loop import FastTime
from tests.support.shared_slot_simulation import on_clock

LOAD_S, FILL_S, SWAP_S, DROP_S, STOP_S = 0.2, 0.3, 0.02, 0.4, 0.3


@dataclass
class Memory:
    """What all engines of one pool hold, by engine and unit."""

    sizes: dict[str, int]
    bound: int
    held: dict[SlowEngine, set[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    peak: int = 0
    armed: set[str] = field(default_factory=set)

    def look(self) -> None:
        total = sum(self.sizes[unit] for units in self.held.values() for unit in units)
        self.peak = max(self.peak, total)
        if total > self.bound:
            self.wrong.append(f"{total} of {self.bound}: {list(self.held.values())}")


class SlowEngine(SimulatedEngine):
    """Its memory is taken from when something begins to come until it has gone entirely."""

    def __init__(self, unit: str, family: frozenset[str], memory: Memory) -> None:
        super().__init__(
            tuple(memory.sizes),
            SimulatedOptions(load_s=LOAD_S, fill_s=FILL_S, swap_s=SWAP_S, decode_ms=10),
        )
        self.family = family
        self.first = unit
        self.memory = memory

    @property
    def swappable_experts(self) -> frozenset[str]:
        return self.family

    def _take(self, unit: str) -> set[str]:
        held = self.memory.held.setdefault(self, set())
        held.add(unit)
        self.memory.look()
        return held

    async def start(self) -> EngineReport:
        self._take(self.first)
        report = await super().start()
        if "start" in self.memory.armed:
            self.memory.armed.discard("start")
            raise ExpertFailedError("told not to start")
        return report

    async def load_to_host(self, expert: str) -> LoadResult:
        held = self._take(expert)
        await asyncio.sleep(FILL_S)
        if "fill" in self.memory.armed:
            self.memory.armed.discard("fill")
            held.discard(expert)
            raise ExpertFailedError("told to fail")
        if "die" in self.memory.armed:
            self.memory.armed.discard("die")
            self.kill("told to die")
            raise EngineDeadError("told to die")
        await self.load(expert)
        return LoadResult(self.memory.sizes[expert], FILL_S)

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        await asyncio.sleep(DROP_S)
        self.memory.held.get(self, set()).discard(expert)
        await super().evict(expert, for_next=for_next)

    async def stop(self) -> None:
        if self in self.memory.held:
            await asyncio.sleep(STOP_S)
            self.memory.held.pop(self, None)
        await super().stop()


class PoolStage:
    """A pool of shared slots, its engines, and clients that ask again when they are moved."""

    def __init__(self, chance: random.Random, *, slots: int, preempt: bool = False) -> None:
        self.chance = chance
        families: list[list[str]] = [[], []]
        self.units: dict[str, Unit] = {}
        self.family_of: dict[str, list[str]] = {}
        for i in range(slots + chance.randint(1, 5)):
            name = f"u{i}"
            family = families[chance.random() < 0.3]
            family.append(name)
            self.family_of[name] = family
            size = chance.choice((5, 10, 10, 30))
            self.units[name] = Unit(name, (name,), size_bytes=size)
        sizes = {name: unit.size_bytes for name, unit in self.units.items()}
        largest = sorted(sizes.values(), reverse=True)
        bound = chance.randint(sum(largest[:slots]), max(sum(largest[:slots]), sum(largest)))
        self.memory = Memory(sizes, bound)
        self.pool = Pool("p")
        self.policy = SwapPolicy(min_stay_s=0.05, max_wait_s=2.0, host_bytes=bound, preempt=preempt)
        names = list(self.units)
        for i in range(slots):
            self.pool.add(self.make_slot([self.units[name] for name in names[i::slots]]))

    def make_slot(self, units: list[Unit]) -> SharedSlot:
        return SharedSlot(
            units,
            lambda unit: SlowEngine(unit, frozenset(self.family_of[unit]), self.memory),
            self.policy,
            capacity=2,
            max_waiting=9,
            start_guess_s=LOAD_S,
            guess=UnitState(host_bytes=10, fill_s=FILL_S, swap_s=SWAP_S),
            changed=self.pool.changed,
        )

    async def ask(self, expert: str, tokens: int = 1) -> str:
        again: LeaseRevokedError | None = None
        while True:
            try:
                slot = self.pool.slot_of(expert)
                async with slot.lease(expert, tokens, again=again) as lease:
                    request = EngineRequest("/v1/completions", expert, b'{"prompt":"x"}', "r")
                    await lease.engine.run(request, _nowhere)
                return "ok"
            except LeaseRevokedError as back:
                again = back
            except EngineDeadError as error:
                slot.report_engine_death()
                return error.code
            except CoeError as error:
                return error.code


async def _nowhere(message: Any) -> None:
    """Nobody reads it."""


async def tell(stage: PoolStage, length: int, rough: float) -> list[Any]:
    chance, pool = stage.chance, stage.pool
    pool.start()
    clients: list[asyncio.Task[str]] = []
    names = list(stage.units)
    changes: list[asyncio.Task[None]] = []
    for _ in range(length):
        name = chance.choice(names)
        if chance.random() < rough:
            match chance.choice(("kill", "arm", "operate", "operate", "remove")):
                case "kill" if stage.memory.held:
                    chance.choice(list(stage.memory.held)).kill("a test killed it")
                case "arm":
                    stage.memory.armed.add(chance.choice(("start", "fill", "die")))
                case "remove" if name in pool.experts and chance.random() < 0.3:
                    changes.append(asyncio.create_task(pool.remove(name, "gone")))
                case _ if name in pool.experts:
                    act = chance.choice(("load", "evict", "pin", "unpin", "unpin"))
                    try:
                        await pool.operate(act, name)
                    except ConflictError:
                        assert act in ("load", "evict", "pin")
        elif (kind := chance.random()) < 0.5:
            clients.append(asyncio.create_task(stage.ask(name, chance.randint(1, 4))))
        elif kind < 0.55 and clients:
            chance.choice(clients).cancel()
        else:
            await asyncio.sleep(chance.choice((0.01, 0.05, 0.3, 1.0)))
    for name in names:
        if name in pool.experts:
            await pool.operate("unpin", name)
    async with asyncio.timeout(600):
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
        await asyncio.gather(*changes)
    await pool.stop(1)
    return outcomes


def play(seed: int, *, slots: int, rough: float, preempt: bool = False) -> tuple[Any, list[Any]]:
    stages: list[PoolStage] = []

    async def whole() -> list[Any]:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            stages.append(PoolStage(random.Random(seed), slots=slots, preempt=preempt))
            return await tell(stages[0], 80, rough)

    outcomes = asyncio.run(whole())
    return stages[0], outcomes


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 3), st.booleans())
def test_pool_under_faults_and_operations_never_exceeds_host_bytes(
    seed: int, slots: int, preempt: bool
) -> None:
    stage, outcomes = play(seed, slots=slots, rough=0.15, preempt=preempt)
    assert stage.memory.wrong == []
    known = {"ok", "over_capacity", "expert_failed", "model_not_found"}
    known |= {"engine_dead", "engine_restarting"}
    strange = [o for o in outcomes if not isinstance(o, asyncio.CancelledError) and o not in known]
    assert strange == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_pool_without_faults_answers_all_within_host_bytes(seed: int, slots: int) -> None:
    stage, outcomes = play(seed, slots=slots, rough=0.0)
    assert stage.memory.wrong == []
    ended = [o for o in outcomes if not isinstance(o, asyncio.CancelledError)]
    assert set(ended) <= {"ok", "over_capacity"}


async def test_pool_growing_slot_waits_until_other_slots_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FastTime(asyncio.get_running_loop())
    on_clock(monkeypatch, lambda: clock.now_s)
    stage = PoolStage(random.Random(0), slots=1)
    stage.memory = Memory({"a": 1, "big": 3, "b1": 1, "b2": 1, "b3": 1}, 5)
    several = ["b1", "b2", "b3"]
    stage.family_of = {"a": ["a"], "big": ["big"]} | {name: several for name in several}
    stage.policy = SwapPolicy(min_stay_s=0.05, max_wait_s=2.0, host_bytes=5)
    pool = stage.pool = Pool("p")
    units = {name: Unit(name, (name,), size_bytes=n) for name, n in stage.memory.sizes.items()}
    first = stage.make_slot([units["a"]])
    pool.add(first)
    pool.add(stage.make_slot([units[name] for name in several]))
    pool.start()
    for name in ("a", "b1", "b2", "b3", "b1"):
        assert await stage.ask(name) == "ok"
    first.take_in(units["big"])
    pool._slot_of["big"] = first
    assert await stage.ask("big") == "ok"
    assert stage.memory.wrong == []
    assert stage.memory.peak == 5
    await pool.stop(0)
