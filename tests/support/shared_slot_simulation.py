"""A shared slot on a clock of its own, with engines that break on demand and tell on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import orjson

from service.config import SimulatedOptions
from service.engine.engine_interface import (
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    Send,
    SwapResult,
)
from service.engine.simulated_engine import SimulatedEngine
from service.errors import CoeError, EngineDeadError, ExpertFailedError
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.base_slot import LeaseRevokedError
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy

UNITS = (Unit("a", ("a", "a-tuned")), Unit("b", ("b",)), Unit("c", ("c",)), Unit("d", ("d",)))
UNIT_OF = {expert: unit.name for unit in UNITS for expert in unit.experts}
EXPERTS = tuple(UNIT_OF)
# The unit with adapters needs an engine of its own.
FAMILIES = (frozenset({"a"}), frozenset({"b", "c", "d"}))
SIZE = 10
LOAD_S, FILL_S, SWAP_S, STEP_MS, STAY_S, WAIT_S = 0.05, 0.1, 0.02, 10, 0.05, 1.0
MOST_TOKENS = 4


@dataclass
class World:
    """What is asked of the engines, and what they saw that must never happen.

    together: the worlds of all slots that share the bound, this one among them.
    """

    bound: int | None
    now: Callable[[], float]
    armed: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    engines: list[FaultyEngine] = field(default_factory=list)
    faults: int = 0
    together: list[World] = field(default_factory=list)

    def look(self, coming: str = "") -> None:
        """Whether more is held than may be; one unit of each slot is always."""
        worlds = self.together or [self]
        there = [
            unit
            for world in worlds
            for engine in world.engines
            if engine.started and engine.failure() is None
            for unit in engine.held
        ]
        there += [coming] if coming else []
        if self.bound is not None and len(there) * SIZE > max(len(worlds) * SIZE, self.bound):
            self.wrong.append(f"{sorted(there)} held")

    def fault(self, call: str) -> str:
        """The fault that was asked for at the next such call."""
        kind = self.armed.pop(call, "")
        self.faults += bool(kind)
        return kind


class FaultyEngine(SimulatedEngine):
    """Knows what it holds and runs, and whose weights a request meets."""

    def __init__(self, unit: str, world: World) -> None:
        self.family = next(f for f in FAMILIES if unit in f)
        experts = tuple(e for e in EXPERTS if UNIT_OF[e] in self.family)
        super().__init__(
            experts,
            SimulatedOptions(load_s=LOAD_S, fill_s=FILL_S, swap_s=SWAP_S, decode_ms=STEP_MS),
        )
        self.world = world
        self.runs = unit
        self.held = {unit}
        self.spoiled = False
        self.started = False
        world.engines.append(self)

    @property
    def swappable_experts(self) -> frozenset[str]:
        return self.family

    async def start(self) -> EngineReport:
        if sum(engine.failure() is None for engine in self.world.engines) > 1:
            self.world.wrong.append("two engines at once")
        self.started = True
        self.world.look()
        if self.world.fault("start"):
            raise ExpertFailedError("told not to start")
        return await super().start()

    async def _break(self, fault: str, at_s: float) -> None:
        await asyncio.sleep(at_s)
        if fault == "die":
            self.kill("told to die")
            raise EngineDeadError("told to die")
        raise ExpertFailedError("told to fail")

    async def load_to_host(self, expert: str) -> LoadResult:
        self.world.look("" if expert in self.held else expert)
        if fault := self.world.fault("fill"):
            await self._break(fault, FILL_S / 2)
        await super().load_to_host(expert)
        self.held.add(expert)
        return LoadResult(SIZE, FILL_S)

    async def swap_in(self, expert: str) -> SwapResult:
        if self._running:
            self.world.wrong.append(f"exchanged under {self._running} requests")
        if expert not in self.held:
            self.world.wrong.append(f"{expert} is not held")
        fault = self.world.fault("exchange")
        if fault in ("die", "fail"):
            await self._break(fault, SWAP_S / 2)
        self.runs = expert
        self._rests = False
        self.spoiled = fault == "spoil"
        await asyncio.sleep(SWAP_S)
        if self._running:
            self.world.wrong.append("a request began during an exchange")
        return SwapResult(SWAP_S, ok=not self.spoiled)

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        if expert == self.runs:
            self.world.wrong.append(f"{expert} dropped while it ran")
        self.held.discard(expert)
        await super().evict(expert, for_next=for_next)

    async def run(self, request: EngineRequest, send: Send) -> None:
        self._look(request.expert)
        try:
            await super().run(request, send)
        finally:
            self._look(request.expert)

    def _look(self, expert: str) -> None:
        if self.failure() is None and (UNIT_OF[expert] != self.runs or self.spoiled):
            self.world.wrong.append(f"{expert} met {self.runs}, spoiled: {self.spoiled}")


class Stage:
    """One slot and its clients."""

    def __init__(
        self,
        world: World,
        *,
        size_guess: int = SIZE,
        pinned: str = "",
        capacity: int = 2,
        prefetch: bool = True,
        preempt: bool = False,
    ) -> None:
        self.world = world
        self.waits: list[float] = []
        self.running = 0
        self.most_running = 0
        self.asked = 0
        self.put_back = 0
        self.slot = SharedSlot(
            tuple(Unit(u.name, u.experts, u.name == pinned) for u in UNITS),
            lambda unit: FaultyEngine(unit, world),
            SwapPolicy(
                min_stay_s=STAY_S,
                max_wait_s=WAIT_S,
                host_bytes=world.bound,
                prefetch=prefetch,
                preempt=preempt,
            ),
            capacity=capacity,
            max_waiting=3,
            start_guess_s=LOAD_S,
            guess=UnitState(host_bytes=size_guess, fill_s=FILL_S, swap_s=SWAP_S),
            changed=lambda: None,
        )

    async def ask(self, expert: str, tokens: int = 1, stream: bool | None = None) -> str:
        """One client: how its request ended, by its error's code or "ok".

        Every other one wants its answer whole, so that it may be put back until the end.
        """
        self.asked += 1
        stream = self.asked % 2 == 0 if stream is None else stream
        body = orjson.dumps({"prompt": "x", "max_tokens": tokens, "stream": stream})
        request = EngineRequest("/v1/completions", expert, body, "r")
        sent: list[Message] = []
        again: LeaseRevokedError | None = None
        while True:
            try:
                await self._run(request, tokens, again, sent)
                break
            except LeaseRevokedError as back:
                if sent:
                    self.world.wrong.append("put back after its first byte")
                again = back
                self.put_back += 1
            except EngineDeadError as error:
                self.slot.report_engine_death()
                return error.code
            except CoeError as error:
                return error.code
        ends = [m for m in sent if m["type"] == "http.response.body" and not m.get("more_body")]
        if len(ends) != 1:
            self.world.wrong.append(f"{len(ends)} ends of one answer")
        whole = b"".join(m.get("body", b"") for m in sent)
        if b'"error"' not in whole and f'"{expert}:'.encode() not in whole:
            self.world.wrong.append(f"{expert} was answered {whole[:200]!r}")
        return "ok"

    async def _run(
        self,
        request: EngineRequest,
        tokens: int,
        again: LeaseRevokedError | None,
        sent: list[Message],
    ) -> None:
        async with self.slot.lease(request.expert, tokens, again=again) as lease:
            void = False

            async def send(message: Message) -> None:
                nonlocal void
                if message["type"] == "http.response.start":
                    void = not lease.commit()
                if not void:
                    sent.append(message)

            self.waits.append(lease.queue_s)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            try:
                await lease.engine.run(request, send)
            finally:
                self.running -= 1


def on_clock(monkeypatched: Any, now: Callable[[], float]) -> None:
    """Let the slot read this clock instead of the machine's."""
    from service.pool import pool
    from service.pool.slots import base_slot, dedicated_slot, host_weights, shared_slot

    clock = SimpleNamespace(monotonic=now)
    for module in (base_slot, dedicated_slot, host_weights, shared_slot, pool):
        monkeypatched.setattr(module, "time", clock)
