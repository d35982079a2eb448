"""A slot that several units share, of which one runs at a time.

The planner decides, and this controller carries the decisions out. For a swap it closes the gate,
waits for the running requests or puts them back into the queue, swaps the weights, and opens the
gate again. An engine that can't swap in place is replaced by a new engine. No request is dropped,
and no request is answered by another unit's weights.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from service.engine.engine_interface import RestingEngine, SwappingEngine
from service.errors import CoeError, ConflictError, EngineDeadError, UnknownModelError
from service.pool.request_queue import Ticket
from service.pool.slot_units import Swap, Unit, UnitState
from service.pool.slots.base_slot import BaseSlot, LeaseRevokedError
from service.pool.slots.host_weights import TICK_S, HostWeights
from service.pool.slots.idle_unload import IDLE, UNLOAD, WAKING_DEMAND, Keep
from service.pool.swap_planner import (
    LATE,
    CloseGate,
    SlotView,
    Stay,
    SwapPolicy,
    UnitView,
    bounded,
    has_room,
    next_fetch,
    next_step,
    units_to_evict,
)
from service.pool.unit_placement import Place
from service.rpc.snapshot import ExpertState
from service.types import Residency

log = logging.getLogger("coe.pool")

_SWAPS_KEPT = 64
# Seconds between two looks at an engine that sleeps.
_ASLEEP_TICK_S = 1.0
# The same where nobody asks and no weights are moved. Arrivals, demand and another policy wake the
# controller; only a death of the engine and the clock of idle experts are noticed by the tick.
_QUIET_TICK_S = 0.25
_UNVERIFIED = "the weights failed verification after a swap"
_EWMA = 0.3  # the weight of the newest measurement in the average duration of a drain


class SlotState(StrEnum):
    """The states of a shared slot. The gate is open only in SERVING.

    STARTING: The slot has no engine, or its engine is starting.
    SERVING: The running unit's requests run.
    CLOSING: The gate is closed and running requests end, so that another unit can be swapped in.
    SWAPPING: Another unit is being swapped in, in this engine or in the next.
    ASLEEP: The engine has given the accelerator back, and holds weights in host memory.
    STOPPING: The engine died or is being replaced, and will be stopped.
    FAILED: The engine could not be started.
    """

    STARTING = "starting"
    SERVING = "serving"
    CLOSING = "closing"
    SWAPPING = "swapping"
    ASLEEP = "asleep"
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class _Respawn:
    """A swap that needs a new engine."""

    unit: str
    reason: str
    began_s: float


class SharedSlot(BaseSlot[SwappingEngine]):
    """An engine and the units that take turns in it.

    Args:
        units: The units. The first engine starts with the first unit.
        build_for: A function that makes an engine which starts with a given unit.
        policy: The policy by which the slot weighs its units.
        capacity: The number of places of the engine. A place runs one request.
        max_waiting: The load that may wait for each expert.
        start_guess_s: The estimated seconds of an engine start, used until a start was measured.
        guess: The estimated sizes and times of units that were not measured yet.
        changed: A callback for every change that the pool's snapshot would show.
        apart: Whether to assume that units with weights of their own can't share an engine. The
            assumption holds until an engine has reported which units it can run.
        refuted: Receives the unit of a swap that has failed, its method where it is known, and the
            reason: its weights failed verification, or the engine died of it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        build_for: Callable[[str], SwappingEngine],
        policy: SwapPolicy,
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        guess: UnitState,
        changed: Callable[[], None],
        apart: bool = False,
        refuted: Callable[[str, str | None, str], None] = lambda unit, method, why: None,
    ) -> None:
        super().__init__(
            tuple(name for unit in units for name in unit.experts),
            capacity=capacity,
            max_waiting=max_waiting,
            start_guess_s=start_guess_s,
            changed=changed,
        )
        self._policy = policy
        self.swaps: list[Swap] = []
        self._swap_counts: dict[tuple[str, str, str], int] = {}
        self._build_for = build_for
        self._refuted = refuted
        self._weights = HostWeights(guess, units[0].name, self)
        self._state = SlotState.STARTING
        # Whether a sleeping engine is being woken.
        self._wakes = False
        # The event wakes the controller before its next tick.
        self._wake = asyncio.Event()
        # Whether requests waited for the running unit at the last step, and whether that step left
        # everything as it was.
        self._own_waiting = False
        self._settled = False
        # The times when the running unit began to run, and when the gate closed for another unit.
        self._running_since_s = 0.0
        # When people last asked for each unit.
        self._people_s: dict[str, float] = {}
        self._closing_since_s: float | None = None
        # The seconds that running requests need to end, and that an engine needs to stop.
        self._drain_s = 0.0
        self._stop_s = 0.0
        # The unit that the present engine started with, the unit without weights of its own that
        # the next engine is for, and the swap that the next engine completes.
        self._started_unit: str | None = None
        self._start_target: str | None = None
        self._respawn: _Respawn | None = None
        # By the unit that an engine started with, the units that this engine reported as runnable.
        self._runnable: dict[str, frozenset[str]] = {}
        self._runnable_apart = apart
        # The units to remove. Each has an event that is set after the removal.
        self._retired: dict[str, asyncio.Event] = {}
        for unit in units:
            self.take_in(unit)
        self._show(self._weights.running_unit, Residency.LOADING)

    @property
    def state(self) -> SlotState:
        """The state of the slot."""
        return self._state

    @property
    def policy(self) -> SwapPolicy:
        """The policy by which the slot weighs its units. Another one wakes the controller."""
        return self._policy

    @policy.setter
    def policy(self, policy: SwapPolicy) -> None:
        if policy != self._policy:
            self._policy = policy
            self._wake.set()

    def _enter(self, state: SlotState) -> None:
        """Change the state. After STOPPING only a new start or a failure may follow."""
        if self._state is not SlotState.STOPPING or state in (
            SlotState.STARTING,
            SlotState.FAILED,
        ):
            self._state = state

    # --- additions and removals

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units of this slot."""
        return self._weights.units

    @property
    def active_units(self) -> list[Unit]:
        """The units of this slot, except those that are being removed."""
        return [unit for unit in self.units if unit.name not in self._retired]

    @property
    def running_unit(self) -> str:
        """The unit that runs, or the unit that the next engine starts with."""
        return self._weights.running_unit

    def unit_of(self, expert: str) -> Unit:
        return self._weights.unit_of(expert)

    def held_bytes(self) -> int:
        """Return the bytes of weights that are in host memory, being loaded or being evicted."""
        return self._weights.held_bytes()

    def take_in(self, unit: Unit, state: UnitState | None = None) -> None:
        """Add a unit. `state` has the measurements of another slot."""
        self._weights.add(unit, state)
        for name in unit.experts:
            self._states[name] = ExpertState(Residency.DISK, released=self._resting)
            self._queue.add_expert(name)
        self._list_experts()

    def hand_over(self, unit: str) -> UnitState | None:
        """Remove a unit that moves to another slot. Its waiting requests follow it there.

        Returns:
            The unit's state with its measurements, or None where the unit can't move now.
        """
        weights = self._weights
        if unit in (self.running_unit, weights.loading_unit) or weights.is_transferring:
            return None
        if weights.unit(unit).needs or weights.dependents_of(unit):
            return None  # units that share weights stay together
        if weights.state(unit).tier not in (Residency.DISK, Residency.HOST):
            return None
        if self._retired and len(self.active_units) == 1:
            return None  # this unit has to run when the retired units are removed
        self._refuse_unit(
            unit, lambda ticket: LeaseRevokedError(ticket.arrived_s, put_back=ticket.again)
        )
        return self._release_unit(unit)

    def _release_unit(self, unit: str) -> UnitState:
        experts = self._weights.unit(unit).experts
        state = self._weights.remove(unit, self._engine)
        self._runnable.pop(unit, None)
        for name in experts:
            del self._states[name]
        self._list_experts()
        return state

    def _list_experts(self) -> None:
        self.experts = tuple(name for unit in self.units for name in unit.experts)
        self._wake.set()
        self._changed()

    async def retire(
        self, unit: str, reason: str, kind: type[CoeError] = UnknownModelError
    ) -> None:
        """Remove a unit for good, once its running requests have ended.

        There must be another unit to run.

        Args:
            unit: The unit.
            reason: Why the unit is gone. Clients that wait for it get this reason.
            kind: The class of the error that these clients get.
        """
        self._refuse_unit(unit, lambda _: kind(reason))
        if self._resting and unit == self._weights.owner_of(self.running_unit):
            others = [u for u in self.active_units if u.name != unit and u.needs != unit]
            if others:
                self._weights.running_unit = self._weights.owner_of(others[0].name)
        if self._engine is None and unit != self.running_unit:
            self._release_unit(unit)
            return
        removed = self._retired[unit] = asyncio.Event()
        self._wake.set()
        await removed.wait()

    async def close(self, reason: str, kind: type[CoeError] = UnknownModelError) -> None:
        await super().close(reason, kind)
        while self._retired:
            self._retired.popitem()[1].set()

    async def _leave_retired(self, engine: SwappingEngine, views: Sequence[UnitView]) -> bool:
        """Remove the retired units.

        Returns:
            False where the successor of the running unit needs a new engine.
        """
        for unit in [name for name in self._retired if name != self.running_unit]:
            if self._weights.is_transferring:
                return True
            self._release_unit(unit)
            self._retired.pop(unit).set()
        if self.running_unit not in self._retired or self._slot_view(time.monotonic()).running:
            return True
        held = {view.name for view in views if view.tier is not Residency.DISK}
        candidates = [
            view
            for view in views
            if view.name not in self._retired and (not view.needs or view.needs in held)
        ]
        if not candidates or self._weights.is_transferring:
            return True
        successor = max(
            candidates,
            key=lambda view: (
                view.waiting,
                view.tier is Residency.HOST,
                view.demand_per_s,
                view.name,
            ),
        )
        self._enter(SlotState.SWAPPING)
        if successor.tier is Residency.HOST:
            return await self._swap(engine, successor.name, "removed")
        slot = self._slot_view(time.monotonic())
        evicted = units_to_evict(slot, views, self.policy, successor.name)
        # The successor is loaded beside the retired unit only if there is room for both.
        has_place = has_room(views, self.policy, successor.name, evicted)
        if not successor.swappable or not has_place:
            self._respawn_for(successor.name, "removed")
            return False
        self._weights.begin_transfer(engine, successor.name, evicted)
        return True

    # --- requests

    def _ready_experts(self) -> set[str]:
        return super()._ready_experts() if self._state is SlotState.SERVING else set()

    def _on_arrival(self, ticket: Ticket) -> None:
        self.record_demand(ticket.expert, 1.0, ticket.arrived_s)
        if not ticket.of_batch:
            self._people_s[self.unit_of(ticket.expert).name] = ticket.arrived_s

    def _on_departure(self) -> None:
        if self._own_waiting or self._depends_on_time():
            self._wake.set()

    def record_demand(self, expert: str, amount: float, now_s: float) -> None:
        """Record demand for an expert: its requests, and requests that gateways sent elsewhere."""
        unit = self.unit_of(expert).name
        state = self._weights.state(unit)
        state.record_demand(amount, now_s)
        if state.decayed_demand(now_s) >= WAKING_DEMAND:
            self.want(expert)
        # The running unit stays in memory, whatever its demand.
        if unit != self.running_unit or self._depends_on_time():
            self._wake.set()

    def _refuse_unit(self, unit: str, error: Callable[[Ticket], Exception]) -> None:
        for name in self._weights.unit(unit).experts:
            self._queue.refuse_waiting(name, error)

    def _swap_s_since(self, since_s: float) -> float:
        # Only the part of each swap after `since_s` counts.
        return sum(
            min(swap.swap_s, max(0.0, swap.began_s + swap.swap_s - since_s)) for swap in self.swaps
        )

    # --- the engine's life

    def _build_engine(self) -> SwappingEngine:
        return self._build_for(self.running_unit)

    async def _prepare_start(self) -> None:
        """Wait for room in host memory before the slot takes its turn to start an engine."""
        self._reset_residency()
        await self._wait_for_host_memory()
        self._weights.reserve()

    async def _wait_for_host_memory(self) -> None:
        """Wait until other slots that share the bound have made room for the unit that starts."""
        while self.policy.most_bytes is not None and self.policy.host_bytes is not None:
            owner = self._weights.owner_of(self.running_unit)
            if self._weights.state(owner).host_bytes <= self.policy.host_bytes:
                return
            await asyncio.sleep(TICK_S)

    async def _start(self, engine: SwappingEngine) -> None:
        """Start the engine with the unit that will run."""
        began_s = time.monotonic()
        unit = self.running_unit
        self._start_began_s = began_s - self._stop_time_s(self._started_unit)
        report = await engine.start()
        self._engine, self._report = engine, report
        for name in self._weights.unit(unit).experts:
            await engine.load(name)
        self._runnable[unit] = engine.swappable_experts
        self._started_unit = unit
        start_s = time.monotonic() - began_s
        self._weights.state(unit).start_s = start_s
        self._on_started(start_s)
        target, self._start_target = self._start_target, None
        # The target unit may have left the slot meanwhile.
        if target is not None and target in self._weights.dependents_of(unit):
            await self._adopt_started_engine(engine, target)
        respawn, self._respawn = self._respawn, None
        if respawn is not None and respawn.unit == self.running_unit:
            swap_s = time.monotonic() - respawn.began_s
            self._record_swap(
                Swap(respawn.unit, "respawn", respawn.reason, respawn.began_s, swap_s)
            )
        self._run_unit(self.running_unit)

    async def _adopt_started_engine(self, engine: SwappingEngine, unit: str) -> None:
        """Let a new engine run the unit that it was started for.

        This happens before the gate opens. Otherwise other units' requests would run first.
        """
        base = self.running_unit
        try:
            self._weights.record_load(unit, await engine.load_to_host(unit))
            if (await engine.swap_in(unit)).ok:
                self._weights.state(base).tier = Residency.HOST
                self._show(base, Residency.HOST)
                self._weights.running_unit = unit
                return
            self.canary_failures += 1
            self._weights.mark_failed(unit, "canary tokens differ from the first load")
            if not (await engine.swap_in(base)).ok:
                raise EngineDeadError(f"the weights of {base!r} differ from the first load")
        except EngineDeadError:
            raise
        except CoeError as error:
            self._weights.mark_failed(unit, error.message)

    def _reset_residency(self) -> None:
        """Reset every unit's residency after the engine's end, and show the unit that starts."""
        self._start_began_s = now_s = time.monotonic()
        self._enter(SlotState.STARTING)
        self._closing_since_s = None
        for unit, state in self._weights:
            state.tier = Residency.DISK
            if state.failed_until <= now_s:
                self._show(unit.name, Residency.DISK)
        self._show(self.running_unit, Residency.LOADING)

    async def _watch(self, engine: SwappingEngine) -> None:
        """Carry out the planner's steps until the engine dies or another engine is needed."""
        try:
            while engine.failure() is None and self._state is not SlotState.STOPPING:
                self._wake.clear()
                if self._resting or not await self._take_step(engine):
                    break
                await self._until_next_step(engine)
        finally:
            slept = self._state is SlotState.ASLEEP
            self._enter(SlotState.STOPPING)
            self._weights.freeze()
            await self._weights.cancel_transfer()
        if (reason := engine.failure()) is not None:
            log.error("engine of %s died (%s); starting another", self.running_unit, reason)
        if self._resting:
            return
        if slept and not self._queue.total:
            # Nobody has asked for another one.
            self._begin_rest("died")
            return
        self._engine = None
        self._reset_residency()

    async def _until_next_step(self, engine: SwappingEngine) -> None:
        """Wait until the planner may decide otherwise than at the last step.

        Events wake the controller. Time alone changes a decision only while requests wait for
        another unit, weights are moved, or idle units may be due. What ends that, such as a client
        that leaves the queue, changes a decision, too.
        """
        while True:
            depended = self._depends_on_time()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s()):
                    await self._wake.wait()
                return
            if engine.failure() is not None or self._resting:
                return
            if depended or self._depends_on_time():
                return

    def _depends_on_time(self) -> bool:
        return (
            not self._settled
            or self._state is not SlotState.SERVING
            or bool(self._retired)
            or bool(self.idle_policy.limits_s)
            or not self._weights.is_idle
            or self._queue.waiting > self._waiting_in(self.running_unit)
        )

    def _tick_s(self) -> float:
        """Return the seconds until the next look, if nothing wakes the controller before."""
        if self._state is SlotState.ASLEEP:
            return _ASLEEP_TICK_S
        return TICK_S if self.why_busy() is not None else _QUIET_TICK_S

    async def _stop_engine(self, engine: SwappingEngine | None) -> None:
        began_s = time.monotonic()
        was_alive = self._weights.is_frozen and engine is not None and engine.failure() is None
        await super()._stop_engine(engine)
        if was_alive:
            self._stop_s = time.monotonic() - began_s
            if (state := self._weights.find_state(self._started_unit)) is not None:
                state.stop_s = self._stop_s
        self._weights.release()

    def report_engine_death(self) -> None:
        self._wake.set()

    def _on_start_failed(self, reason: str) -> None:
        # Only the unit that the engine was starting with is at fault.
        self._enter(SlotState.FAILED)
        self._show(self.running_unit, Residency.FAILED, reason)

    def _retry_delay_s(self) -> float:
        # Another unit may be able to start meanwhile.
        now_s = time.monotonic()
        self._weights.retry_later(self.running_unit)
        failed = {unit.name for unit, state in self._weights if state.failed_until > now_s}
        able = [
            unit.name
            for unit in self.active_units
            if unit.name not in failed and (unit.needs or unit.name) not in failed
        ]
        if not able:
            return super()._retry_delay_s()
        self._start_next_for(max(able, key=self._waiting_in))
        return 0.5

    # --- steps

    async def _take_step(self, engine: SwappingEngine) -> bool:
        """Carry out one step of the planner.

        Returns:
            False where the next unit needs another engine.
        """
        now_s = time.monotonic()
        self._settled = False
        if self._state is SlotState.ASLEEP:
            if self._queue.total or self._retired or self._wanted.is_set():
                return await self._resume(engine)
            return True
        slot = self._slot_view(now_s)
        self._own_waiting = slot.waiting > 0
        views = bounded(slot, self._unit_views(now_s, engine.swappable_experts), self.policy)
        if self._retired:
            if self._weights.is_idle:
                # Other slots may need the room before the removal has finished.
                evicted = units_to_evict(slot, views, self.policy, None)
                self._weights.begin_transfer(engine, None, evicted)
            return await self._leave_retired(engine, views)
        step = next_step(slot, views, self.policy)
        if isinstance(step, Stay):
            self._settled = True
            self._closing_since_s = None
            if self._state is not SlotState.SERVING:
                self._enter(SlotState.SERVING)
                self._grant()
        elif isinstance(step, CloseGate):
            if self._state is SlotState.SERVING or self._closing_since_s is None:
                self._closing_since_s = now_s
            self._enter(SlotState.CLOSING)
            if self.policy.preempt and step.reason == LATE and self._has_fresh_waiter(step.unit):
                self._revoke_leases()
        else:
            self._enter(SlotState.SWAPPING)
            if self._closing_since_s is not None:
                drain_s = now_s - self._closing_since_s
                # The estimate rises at once and falls slowly, to keep the bound on waiting.
                self._drain_s = max(drain_s, self._drain_s + _EWMA * (drain_s - self._drain_s))
            if self._weights.state(step.unit).tier is not Residency.HOST:
                self._respawn_for(step.unit, step.reason)
                return False
            return await self._swap(engine, step.unit, step.reason)
        if self._weights.is_idle:
            loaded = next_fetch(slot, views, self.policy)
            evicted = units_to_evict(slot, views, self.policy, loaded)
            self._weights.begin_transfer(engine, loaded, evicted)
        if self.idle_policy.limits_s and self._weights.is_idle:
            return await self._unload_idle(engine, now_s)
        return True

    # --- idle experts

    def why_busy(self) -> str | None:
        if self._queue.total:
            return "requests run or wait"
        weights = self._weights
        settled = self._state in (SlotState.SERVING, SlotState.ASLEEP)
        if self._state is SlotState.ASLEEP and (self._wakes or self._wanted.is_set()):
            return "weights are being moved"
        if self._engine is None or not settled or not weights.is_idle or self._retired:
            return "weights are being moved"
        return None

    def _keeps_host(self, keep: Keep | None) -> bool:
        """Return whether the engine sleeps, with weights in host memory, instead of ending."""
        engine, wanted = self._engine, keep or self.idle_policy.keep or "host"
        return wanted == "host" and isinstance(engine, RestingEngine) and engine.can_rest

    def _is_due(self, unit: Unit, now_s: float) -> bool:
        # Adapters come and go with their base's weights, and so do units that run on them.
        names = [*unit.experts]
        for other in self._weights.dependents_of(unit.name):
            names += self._weights.unit(other).experts
        return self.idle_policy.is_due(names, self._used_s, now_s)

    async def _unload_idle(self, engine: SwappingEngine, now_s: float) -> bool:
        """Unload what nobody has asked for as long as it may stay.

        Returns:
            False where the engine has to end, or died.
        """
        weights = self._weights
        if self.why_busy() is not None:
            return True
        running = weights.unit(weights.owner_of(self.running_unit))
        if self._keeps_host(None):
            if self._is_due(running, now_s):
                return await self._sleep(engine, IDLE)
            return True
        held = [unit for unit, state in weights if state.tier is not Residency.DISK]
        owners = [unit for unit in held if not unit.needs]
        due = [unit for unit in owners if self._is_due(unit, now_s)]
        is_pinned = any(weights.state(unit.name).pinned for unit in held)
        if not is_pinned and len(due) == len(owners):
            self._begin_rest(IDLE)
            return False
        for unit in due:
            stays = unit.name == running.name or weights.state(unit.name).pinned
            if stays or weights.find_user(unit.name) is not None:
                continue
            if self.why_busy() is not None:
                return True
            self._count_unload(IDLE, unit.name)
            await self._forget(engine, unit.name)
        return True

    async def _forget(self, engine: SwappingEngine, unit: str) -> None:
        """Evict a unit for which there shall be no prefetch."""
        state = self._weights.state(unit)
        state.wanted = False
        state.demand = 0.0
        await self._weights.evict(engine, unit)

    async def _sleep(self, engine: SwappingEngine, reason: str) -> bool:
        """Put the engine to sleep. No request may run or wait.

        Returns:
            False where the engine died of it.
        """
        assert isinstance(engine, RestingEngine)
        self._enter(SlotState.ASLEEP)
        self._wanted.clear()
        unit = self.running_unit
        self._weights.state(unit).tier = Residency.HOST
        for _, state in self._weights:
            state.demand = 0.0
        for name in self._weights.unit(unit).experts:
            self._states[name] = replace(
                self._states[name], state=Residency.HOST, eta_s=0.0, released=True
            )
        self._changed()
        self._count_unload(reason)
        try:
            await engine.rest()
        except CoeError as error:
            log.error("engine of %s could not be put to sleep: %s", unit, error.message)
            self._weights.freeze()
            return False
        finally:
            self._at_rest.set()
        log.info("%s: the engine sleeps (%s)", unit, reason)
        return True

    async def _resume(self, engine: SwappingEngine) -> bool:
        """Wake a sleeping engine, for the unit whose request has waited longest.

        Returns:
            False where the engine died of it.
        """
        assert isinstance(engine, RestingEngine)
        self._wanted.clear()
        before, unit = self.running_unit, self._longest_waiting() or self.running_unit
        if unit != before and self._weights.state(unit).tier is Residency.HOST:
            self._enter(SlotState.SWAPPING)
            awake = await self._swap(engine, unit, IDLE)
            # A swap that failed has woken the unit from before.
            if awake and self.running_unit == before:
                self._run_unit(before)
            return awake
        began_s = time.monotonic()
        self._wakes = True
        try:
            await engine.resume()
        except CoeError as error:
            self._weights.record_engine_death(before, error)
            return False
        finally:
            self._wakes = False
        swap_s = time.monotonic() - began_s
        self._record_swap(Swap(before, "sleep", IDLE, began_s, swap_s))
        self._run_unit(before)
        return True

    def _longest_waiting(self) -> str | None:
        """Return the unit whose request has waited longest; None where none waits."""
        oldest = [
            (ticket.arrived_s, unit.name)
            for unit in self.active_units
            for name in unit.experts
            for ticket in self._queue.waiting_for(name)
        ]
        return min(oldest)[1] if oldest else None

    def want(self, expert: str) -> None:
        if self._state is SlotState.ASLEEP:
            self._wanted.set()
            self._wake.set()
        super().want(expert)

    def _begin_rest(self, reason: str) -> None:
        # The bytes count until the engine's process has ended.
        self._weights.freeze()
        super()._begin_rest(reason)

    def _show_rest(self) -> None:
        now_s = time.monotonic()
        for unit, state in self._weights:
            state.tier = Residency.DISK
            state.demand = 0.0
            state.wanted = False
            if state.failed_until > now_s:
                continue
            for name in unit.experts:
                self._states[name] = replace(
                    self._states[name], state=Residency.DISK, reason="", eta_s=0.0, released=True
                )
        self._changed()

    def _on_wanted(self, expert: str | None) -> None:
        unit = self._longest_waiting()
        if unit is None and expert is not None and expert in self._states:
            unit = self.unit_of(expert).name
        unit = unit or self.running_unit
        if unit in self._retired or unit not in self._weights:
            unit = self.running_unit
        self._respawn = _Respawn(unit, IDLE, time.monotonic())
        self._start_next_for(unit)

    async def _release(self, keep: Keep | None, reason: str) -> None:
        if self._state is SlotState.ASLEEP and self._keeps_host(keep):
            return
        if not self._keeps_host(keep):
            held = [state for _, state in self._weights if state.tier is not Residency.DISK]
            if any(state.pinned for state in held):
                raise ConflictError(
                    f"{self.running_unit}: pinned weights would leave host memory with the engine; "
                    "unpin them first"
                )
            await super()._release(keep, reason)
            return
        assert self._engine is not None
        self._at_rest.clear()
        if not await self._sleep(self._engine, reason):
            self.on_engine_death()

    def _has_fresh_waiter(self, unit: str) -> bool:
        """Return whether a request that was never put back waits for a unit.

        Without this condition two units could put back each other's requests for ever.
        """
        return any(
            not ticket.again
            for name in self._weights.unit(unit).experts
            for ticket in self._queue.waiting_for(name)
        )

    async def _swap(self, engine: SwappingEngine, unit: str, reason: str) -> bool:
        """Swap in a held unit.

        Returns:
            False where the engine died or has to be replaced.
        """
        weights = self._weights
        began_s = time.monotonic()
        # The unit counts as neither held nor running during the swap, so that it can't be evicted.
        weights.state(unit).tier = Residency.LOADING
        lived = engine.failure() is None
        try:
            result = await engine.swap_in(unit)
        except CoeError as error:
            if isinstance(error, EngineDeadError) or engine.failure() is not None:
                if lived:
                    self._refuted(unit, None, f"the engine died in a swap: {error.message}")
                weights.record_engine_death(unit, error)
                return False
            weights.mark_failed(unit, error.message)
            if weights.find_user(unit) is not None:
                weights.state(unit).tier = Residency.HOST
                return True
            with suppress(CoeError):
                await weights.evict(engine, unit)
            return True
        if not result.ok:
            self.canary_failures += 1
            self._refuted(unit, result.method, _UNVERIFIED)
            log.error("weight verification failed for %s after swap; restarting engine", unit)
            self._respawn_for(unit, "canary")
            return False
        state = weights.state(unit)
        state.deaths = 0
        state.record_swap(result.swap_s, started=result.started)
        before = self.running_unit
        weights.state(before).tier = Residency.HOST
        self._show(before, Residency.HOST)
        self._record_swap(Swap(unit, result.method, reason, began_s, result.swap_s))
        self._run_unit(unit)
        return True

    def _respawn_for(self, unit: str, reason: str) -> None:
        """Stop using this engine, and start the next engine for `unit`."""
        self._weights.freeze()
        self._respawn = _Respawn(unit, reason, time.monotonic())
        self._start_next_for(unit)

    def _start_next_for(self, unit: str) -> None:
        """Let the next engine start with the weights that a unit runs on."""
        owner = self._weights.owner_of(unit)
        self._weights.running_unit = owner
        self._start_target = unit if unit != owner else None

    def _run_unit(self, unit: str) -> None:
        """Open the gate for a unit whose weights are in place."""
        self._weights.running_unit = unit
        self._running_since_s = time.monotonic()
        self._closing_since_s = None
        state = self._weights.state(unit)
        state.tier = Residency.DEVICE
        state.failed_until = 0.0
        state.wanted = False
        for name in self._weights.unit(unit).experts:
            self._states[name] = self._serving_state()
        self._enter(SlotState.SERVING)
        self._grant()
        self._changed()

    # --- changes of residency

    def _show(self, unit: str, residency: Residency, reason: str = "") -> None:
        for name in self._weights.unit(unit).experts:
            self._states[name] = replace(
                self._states[name], state=residency, reason=reason, eta_s=0.0, released=False
            )
        self._changed()

    def on_residency(self, unit: str, residency: Residency, reason: str = "") -> None:
        self._show(unit, residency, reason)
        if residency is Residency.FAILED:
            self._refuse_failed()

    def on_retry(self, unit: str) -> None:
        names = self._weights.unit(unit).experts
        if all(self._states[name].state is Residency.FAILED for name in names):
            self._show(unit, self._weights.state(unit).tier)
        self._wake.set()

    def on_engine_death(self) -> None:
        self._enter(SlotState.STOPPING)
        self._wake.set()

    def on_transfer_end(self) -> None:
        self._wake.set()

    # --- operations

    def set_pinned(self, expert: str, pinned: bool) -> None:
        """Pin or unpin an expert's unit in host memory."""
        self._weights.state(self.unit_of(expert).name).pinned = pinned
        self._wake.set()

    async def operate(self, operation: str, expert: str) -> None:
        unit = self.unit_of(expert).name
        state = self._weights.state(unit)
        if operation in ("pin", "unpin"):
            state.pinned = operation == "pin"
        elif operation == "load":
            if self._resting or self._state is SlotState.ASLEEP:
                state.wanted = unit != self.running_unit
                self.want(expert)
            else:
                state.wanted = self._has_to_load(unit)
        elif operation == UNLOAD:
            await self._unload(unit)
        else:
            self._weights.check_evictable(expert)
            engine = self._engine
            if engine is None:
                raise ConflictError("the slot's engine is starting; nothing is held")
            if (user := self._weights.find_user(unit)) is not None:
                raise ConflictError(f"expert {user!r} runs on it or is pinned: it can't be evicted")
            await self._forget(engine, unit)
        self._wake.set()

    async def _unload(self, unit: str) -> None:
        """Unload one unit: with its engine where it is the one that runs.

        Raises:
            ConflictError: Requests run or wait, or weights are being moved.
        """
        weights = self._weights
        owner = weights.owner_of(unit)
        if self._resting or weights.state(owner).tier is Residency.DISK:
            return
        if self._state is SlotState.ASLEEP or owner == weights.owner_of(self.running_unit):
            await self.release()
            return
        waits = any(map(self._waiting_in, (owner, *weights.dependents_of(owner))))
        if waits or not weights.is_idle or self._engine is None:
            raise ConflictError(f"expert {unit!r} has waiting requests, or weights are being moved")
        weights.check_evictable(weights.unit(owner).experts[0])
        self._count_unload(UNLOAD, owner)
        await self._forget(self._engine, owner)

    def _has_to_load(self, unit: str) -> bool:
        """Return whether a unit that an operator wants in host memory has to be loaded.

        Raises:
            ConflictError: The unit can't be loaded.
        """
        state = self._weights.state(unit)
        if state.tier is not Residency.DISK:
            return False
        now_s = time.monotonic()
        if state.failed_until > now_s:
            raise ConflictError(f"expert {unit!r} could not be loaded: {self._states[unit].reason}")
        if (engine := self._engine) is None:
            return unit != self.running_unit  # the next engine starts with the running unit
        views = self._unit_views(now_s, engine.swappable_experts)
        views = bounded(self._slot_view(now_s), views, self.policy)
        if not any(view.name == unit and view.swappable for view in views):
            raise ConflictError(
                f"expert {unit!r} can't be held beside {self.running_unit!r}: it needs an engine "
                "of its own, or more host_bytes; it is started when it is asked for"
            )
        return True

    # --- times

    def _start_time_s(self, unit: str) -> float:
        """Return the seconds that a new engine takes to start and run a unit.

        The end of the present engine does not count.
        """
        owner = self._weights.owner_of(unit)
        state = self._weights.find_state(owner)
        start_s = (state.start_s if state is not None else 0.0) or self._start_s
        if owner == unit:
            return start_s
        own = self._weights.state(unit)
        return start_s + own.fill_s + own.swap_s

    def _stop_time_s(self, unit: str | None) -> float:
        """Return the seconds that an engine takes to stop, by the unit that it started with."""
        state = self._weights.find_state(unit)
        return (state.stop_s if state is not None else 0.0) or self._stop_s

    def _respawn_time_s(self, unit: str) -> float:
        """Return the seconds to replace this engine by another engine that runs a unit."""
        return self._stop_time_s(self._started_unit) + self._start_time_s(unit)

    def _round_trip_s(self, unit: str, able: Collection[str]) -> tuple[float, float]:
        """Return the seconds of a swap from the running unit to a held unit, and back again."""
        weights, running = self._weights, self.running_unit
        if unit == running:
            swap_s = weights.state(unit).swap_s
            return swap_s, swap_s
        if unit not in able:
            there_s, back_s = self._start_time_s(unit), self._start_time_s(running)
            stopped = running if self._engine is None else self._started_unit
            return self._stop_time_s(stopped) + there_s, self._stop_time_s(unit) + back_s
        there, back = weights.state(unit), weights.state(running)
        there_s = self._start_time_s(unit) if there.starts else there.swap_s
        return there_s, back.swap_s if back.measured else there.swap_s

    def _full_start_s(self) -> float:
        # The time counts from the moment when the earlier engine began to stop.
        waits = self._resting or (self._turn_asked_s is not None and not self._has_turn)
        unit = self.running_unit
        return self._start_time_s(unit) if waits else self._respawn_time_s(unit)

    def _runnable_units(self) -> frozenset[str]:
        """Return the units that this slot's engine can run.

        While an engine starts, the result is what an earlier engine reported, or else a guess.
        """
        if self._engine is not None:
            return self._engine.swappable_experts
        running = self.running_unit
        if (reported := self._runnable.get(running)) is not None:
            return reported
        names = frozenset(unit.name for unit in self.units)
        if not self._runnable_apart:
            return names
        owner_of = self._weights.owner_of
        return frozenset(name for name in names if owner_of(name) == owner_of(running))

    # --- figures

    def _record_swap(self, swap: Swap) -> None:
        self.swaps.append(swap)
        del self.swaps[:-_SWAPS_KEPT]
        key = (swap.unit, swap.method, swap.reason)
        self._swap_counts[key] = self._swap_counts.get(key, 0) + 1

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        return dict(self._swap_counts)

    def details(self) -> dict[str, dict[str, Any]]:
        details = super().details()
        last = {swap.unit: swap for swap in self.swaps}
        for name, entry in details.items():
            unit = self.unit_of(name).name
            state = self._weights.state(unit)
            entry |= {
                "unit": unit,
                "pinned": state.pinned,
                "host_bytes": state.host_bytes if state.tier is not Residency.DISK else 0,
                "fill_s": round(state.fill_s, 3),
                "stall_s": round(state.stall_s, 4),
                "swap_s": round(state.swap_s, 4),
            }
            if (swap := last.get(unit)) is not None:
                entry["last_swap"] = {
                    "method": swap.method,
                    "reason": swap.reason,
                    "swap_s": round(swap.swap_s, 4),
                    "ago_s": round(time.monotonic() - swap.began_s, 1),
                }
        return details

    def states(self) -> dict[str, ExpertState]:
        """Return each expert's state with the time until it could answer if its turn came now.

        The planner uses the same times. They include the start of another engine where a unit
        needs one. `swap_s` is the mean of a swap to the expert and of the swap back.
        """
        able = self._able_units()
        start_left_s = self.ahead_s + self.start_left_s()
        times: dict[str, tuple[float, float]] = {}
        for unit, unit_state in self._weights:
            name = unit.name
            there_s, back_s = self._round_trip_s(name, able)
            fetch_s = self._weights.fetch_time_s(name) if name in able else 0.0
            if self._resting:
                # The next engine starts with the unit that is asked for first.
                eta_s = float(round(self.ahead_s + self._start_time_s(name)))
            elif self._engine is None:
                # The time is rounded. Otherwise a countdown would change every snapshot.
                after_s = 0.0 if name == self.running_unit else fetch_s + there_s
                eta_s = float(round(start_left_s + after_s))
            elif unit_state.tier is not Residency.DISK:
                eta_s = round(there_s, 3)
            else:
                eta_s = round(fetch_s + there_s, 1)
            times[name] = eta_s, round((there_s + back_s) / 2, 3)
        states = {}
        for name, state in self._states.items():
            eta_s, swap_s = times[self.unit_of(name).name]
            waits = state.state in (Residency.HOST, Residency.DISK, Residency.LOADING)
            eta_s = eta_s if waits else 0.0
            if state.eta_s != eta_s or state.swap_s != swap_s:
                # It is kept, so that a state that does not change is the same object each time.
                state = self._states[name] = replace(state, eta_s=eta_s, swap_s=swap_s)
            states[name] = state
        return states

    def _able_units(self) -> Collection[str]:
        """Return the units that the engine can run and that fit in the bound on host memory."""
        runnable, policy = self._runnable_units(), self.policy
        bound = policy.most_bytes if policy.most_bytes is not None else policy.host_bytes
        running, now_s = self._weights.owner_of(self.running_unit), time.monotonic()
        stays = largest = 0
        is_missing = bool(self._retired)
        for unit, state in self._weights:
            is_missing = is_missing or state.failed_until > now_s
            if state.host_bytes > largest:
                largest = state.host_bytes
            if state.pinned or unit.name == running:
                stays += state.host_bytes
        if not is_missing and (bound is None or stays + largest <= bound):
            return runnable
        views = bounded(self._slot_view(now_s), self._unit_views(now_s, runnable), policy)
        return {view.name for view in views if view.swappable}

    # --- views for the planner and for placement

    def view(self, pool_units: Iterable[str]) -> Place:
        """Return this slot as placement sees it.

        Args:
            pool_units: The units of all slots of the pool.
        """
        now_s = time.monotonic()
        engine = self._engine
        able = engine.swappable_experts if engine is not None else frozenset()
        is_settled = self._weights.loading_unit is None and not self._retired
        # A slot that rests takes in any unit, at the cost of an engine's start.
        return Place(
            self._slot_view(now_s),
            self._unit_views(now_s, able),
            frozenset(pool_units) & able,
            settled=(engine is not None or self._resting) and is_settled,
        )

    def _waiting_in(self, unit: str) -> int:
        return sum(self._queue.counts(name)[0] for name in self._weights.unit(unit).experts)

    def _slot_view(self, now_s: float) -> SlotView:
        running = self.running_unit
        experts = self._weights.unit(running).experts
        return SlotView(
            running,
            now_s - self._running_since_s,
            sum(self._queue.counts(name)[1] for name in experts),
            self._waiting_in(running),
            self._drain_s,
            closing=self._closing_since_s is not None,
            batch_running=sum(self._queue.batch_counts(name)[1] for name in experts),
            batch_waiting=sum(self._queue.batch_counts(name)[0] for name in experts),
            people_ago_s=now_s - self._people_s.get(running, -math.inf),
        )

    def _unit_views(self, now_s: float, able: frozenset[str]) -> list[UnitView]:
        """Return the units as the planner sees them. `able` has the units the engine can run."""
        views = []
        weights, none_waits = self._weights, ()
        stop_s = self._stop_time_s(self._started_unit)
        asked = self._queue.waiting_experts()
        for unit, state in weights:
            name = unit.name
            # A failed unit may still be held, because other units run on its weights.
            failed = state.failed_until > now_s and state.tier is not Residency.HOST
            if (failed or name in self._retired) and name != self.running_unit:
                continue
            waiting: Sequence[Ticket] = none_waits
            if asked and not asked.isdisjoint(unit.experts):
                waiting = [t for expert in unit.experts for t in self._queue.waiting_for(expert)]
            is_able = name in able
            # Most units have weights of their own, and their times need no other unit's.
            start_s = state.start_s or self._start_s
            if unit.needs is not None:
                start_s = self._start_time_s(name)
            swap_s = stop_s + start_s
            if is_able:
                swap_s = (
                    start_s if state.starts else state.swap_s + self._weights.fetch_time_s(name)
                )
            views.append(
                UnitView(
                    name=name,
                    tier=Residency.LOADING if name == weights.loading_unit else state.tier,
                    waiting=len(waiting),
                    waiting_tokens=sum(ticket.tokens for ticket in waiting) if waiting else 0,
                    oldest_s=max((now_s - t.arrived_s for t in waiting), default=0.0)
                    if waiting
                    else 0.0,
                    demand_per_s=state.demand_per_s(now_s),
                    host_bytes=0 if unit.needs else state.host_bytes,
                    fill_s=state.fill_s,
                    swap_s=swap_s,
                    pinned=state.pinned,
                    swappable=is_able,
                    wanted=state.wanted,
                    needs=unit.needs,
                    start_s=stop_s + start_s,
                    batch_waiting=sum(ticket.of_batch for ticket in waiting) if waiting else 0,
                )
            )
        return views
