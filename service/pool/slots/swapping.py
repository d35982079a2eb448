"""A slot that several units share, one running at a time.

The planner decides; this module does what it says: closes the gate, waits for the
running requests or puts them back into the queue, exchanges the weights (in place where
the engine can, with a new engine where not), opens the gate. No request is dropped, and
none is answered by another unit's weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

from service.engine.base import SwappingEngine
from service.errors import CoeError, EngineDeadError, UnknownModelError
from service.pool.lease import LeaseRevokedError
from service.pool.planner import (
    LATE,
    Next,
    UnitView,
    bounded,
    has_room,
    next_fetch,
    next_step,
    to_drop,
)
from service.pool.slots.host_weights import RETRY_S, TICK_S, HostWeightSlot
from service.pool.units import Swap, Unit, UnitState
from service.rpc.snapshot import ExpertState
from service.types import Residency

log = logging.getLogger("coe.pool")

_EWMA = 0.3  # of how long ending the running requests takes


class SwapSlot(HostWeightSlot):
    """An engine and the units that take turns in it.

    `build_for(unit)` makes an engine that starts with that unit running. `guess` stands in
    until a unit was measured.
    """

    # Whom the next engine is started for, where that is a unit without weights of its own.
    _meant = ""
    # The swap that the next engine is started for: its unit, why, and when it began.
    _respawn: tuple[str, str, float] | None = None

    # --- units come and go

    def hand_over(self, unit: str) -> UnitState | None:
        """Give a unit to another slot: what is known of it, or None where it can't go now.

        Who waits for it is put back, and finds it where it is then.
        """
        if unit in (self._unit, self._filling_unit) or self._filling is not None:
            return None
        if self._units[unit].needs or any(one.needs == unit for one in self.units):
            return None  # they stay together
        if self._known[unit].tier not in (Residency.DISK, Residency.HOST):
            return None
        if self._retired and len(self.active_units) == 1:
            return None  # who is to go needs somebody who can run instead
        self._reject_waiting(
            unit, lambda ticket: LeaseRevokedError(ticket.arrived_s, put_back=ticket.again)
        )
        return self._release_unit(unit)

    def _release_unit(self, unit: str) -> UnitState:
        known = self._forget_unit(unit)
        if known.tier is Residency.HOST and self._engine is not None:
            self._dropping[unit] = known.host_bytes
            self._fetch(self._engine, None, [], gone=unit)
        return known

    @property
    def active_units(self) -> list[Unit]:
        """Its units, without those that are to go for good."""
        return [unit for unit in self.units if unit.name not in self._retired]

    async def close(self, why: str, kind: type[CoeError] = UnknownModelError) -> None:
        """All its experts go for good, and with them those that were to go already."""
        await super().close(why, kind)
        while self._retired:
            self._retired.popitem()[1].set()

    async def retire(self, unit: str, why: str, kind: type[CoeError] = UnknownModelError) -> None:
        """A unit goes for good: who waits for it is told why, who runs is let end.

        Returns when nothing of it is left. There must be another unit to run.
        """
        self._reject_waiting(unit, lambda _: kind(why))
        if self._engine is None and unit != self._unit:
            self._release_unit(unit)
            return
        gone = self._retired[unit] = asyncio.Event()
        self._event.set()
        await gone.wait()

    async def _leave_retired(self, engine: SwappingEngine, units: list[UnitView]) -> bool:
        """Let go of units that are to go. False: the one that comes needs another engine."""
        for unit in [name for name in self._retired if name != self._unit]:
            if self._filling is not None:
                return True
            self._release_unit(unit)
            self._retired.pop(unit).set()
        if self._unit not in self._retired or self._slot_view(time.monotonic()).running:
            return True
        held = {one.name for one in units if one.tier is not Residency.DISK}
        heirs = [
            one
            for one in units
            if one.name not in self._retired and (not one.needs or one.needs in held)
        ]
        if not heirs or self._filling is not None:
            return True
        heir = max(
            heirs,
            key=lambda one: (one.waiting, one.tier is Residency.HOST, one.demand_per_s, one.name),
        )
        self._open = False
        if heir.tier is Residency.HOST:
            return await self._swap(engine, heir.name, "removed")
        drops = to_drop(self._slot_view(time.monotonic()), units, self.policy, heir.name)
        # It is only fetched beside the unit that goes where there is room for both.
        if not heir.exchangeable or not has_room(units, self.policy, heir.name, drops):
            self._respawn_for(heir.name, "removed")
            return False
        self._fetch(engine, heir.name, drops)
        return True

    # --- the engine's life

    async def _make_ready(self) -> None:
        """Nothing is held; wait for room, before others' starts would have to wait for that."""
        self._reset_residency()
        await self._wait_for_host_memory()
        self._occupied = True

    async def _end(self, engine: SwappingEngine | None) -> None:
        began_s = time.monotonic()
        lived = self._ending_bytes is not None and engine is not None and engine.failure() is None
        await super()._end(engine)
        if lived:
            self._stop_s = time.monotonic() - began_s
            if (known := self._known.get(self._first)) is not None:
                known.stop_s = self._stop_s
        self._occupied, self._ending_bytes = False, None
        self._dropping.clear()
        self._clearing.clear()

    async def _bring_up(self, engine: SwappingEngine) -> None:
        """Start the engine with the unit that is to run."""
        began_s = time.monotonic()
        self._started_at = began_s - self._stop_of(self._first)
        report = await engine.start()
        self._engine, self._report = engine, report
        for name in self._units[self._unit].experts:
            await engine.load(name)
        self._able[self._unit] = engine.swappable_experts
        self._first = self._unit
        self._start_s = time.monotonic() - began_s
        self._known[self._unit].start_s = self._start_s
        self._failed_starts = 0
        self._has_worked = True
        meant, self._meant = self._meant, ""
        if meant in self._units and self._units[meant].needs == self._unit:
            await self._adopt_started_engine(engine, meant)
        if self._respawn is not None and self._respawn[0] == self._unit:
            unit, reason, began_s = self._respawn
            self._note(Swap(unit, "respawn", reason, began_s, time.monotonic() - began_s))
        self._respawn = None
        self._run_unit(self._unit)

    async def _wait_for_host_memory(self) -> None:
        """Where slots share a bound: wait until others have made room for the unit that starts."""
        while self.policy.most_bytes is not None and self.policy.host_bytes is not None:
            if self._known[self._weight_owner(self._unit)].host_bytes <= self.policy.host_bytes:
                return
            await asyncio.sleep(TICK_S)

    async def _adopt_started_engine(self, engine: SwappingEngine, unit: str) -> None:
        """Give an engine that has just started to the unit that it was started for.

        Before the gate opens: whoever waits for others would have it started for them first.
        """
        base = self._unit
        try:
            filled = await engine.load_to_host(unit)
            known = self._known[unit]
            known.host_bytes, known.fill_s = filled.host_bytes, filled.fill_s
            known.starts = filled.starts
            if (await engine.swap_in(unit)).ok:
                self._known[base].tier = Residency.HOST
                self._set_unit(base, Residency.HOST)
                self._unit = unit
                return
            self.canary_failures += 1
            self._fail_unit(unit, "it does not answer as when it was first loaded")
            await engine.swap_in(base)
        except EngineDeadError:
            raise
        except CoeError as error:
            self._fail_unit(unit, error.message)

    def _reset_residency(self) -> None:
        """Whatever an engine held went with it; the next one starts with the running unit."""
        self._started_at = now_s = time.monotonic()
        self._open = self._gone = False
        self._closed_s = None
        for name, known in self._known.items():
            known.tier = Residency.DISK
            if known.failed_until <= now_s:
                self._set_unit(name, Residency.DISK)
        self._set_unit(self._unit, Residency.LOADING)

    async def _watch(self, engine: SwappingEngine) -> None:
        """Do what the planner says until the engine dies, or another kind of engine is needed."""
        self._lost.clear()
        try:
            while engine.failure() is None and not self._gone:
                self._event.clear()
                if not await self._steer(engine):
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(TICK_S):
                        await self._event.wait()
        finally:
            self._open = False
            self._freeze_held()
            if self._filling is not None:
                self._filling.cancel()
                await asyncio.gather(self._filling, return_exceptions=True)
                self._filling = self._filling_unit = None
        if (why := engine.failure()) is not None:
            log.error("engine of %s died (%s); starting another", self._unit, why)
        self._engine = None
        self._reset_residency()

    def lost(self) -> None:
        """A request saw the engine die."""
        super().lost()
        self._event.set()

    async def _steer(self, engine: SwappingEngine) -> bool:
        """One look and what follows from it. False: this engine can't run who is next."""
        now_s = time.monotonic()
        slot = self._slot_view(now_s)
        units = bounded(slot, self._unit_views(now_s, engine.swappable_experts), self.policy)
        if self._retired:
            if self._filling is None and not self._dropping:
                # Others may need the room meanwhile.
                self._fetch(engine, None, to_drop(slot, units, self.policy, None))
            return await self._leave_retired(engine, units)
        step = next_step(slot, units, self.policy)
        if step.act is Next.STAY:
            self._closed_s = None
            if not self._open:
                self._open = True
                self._grant()
        elif step.act is Next.CLOSE:
            if self._open or self._closed_s is None:
                self._closed_s = now_s
            self._open = False
            if self.policy.preempt and step.reason == LATE and self._has_fresh_waiter(step.unit):
                self._put_back()
        else:
            self._open = False
            if self._closed_s is not None:
                drain_s = now_s - self._closed_s
                # Up at once, down slowly: the bound on waiting is reckoned with it.
                self._drain_s = max(drain_s, self._drain_s + _EWMA * (drain_s - self._drain_s))
            if self._known[step.unit].tier is not Residency.HOST:
                self._respawn_for(step.unit, step.reason)
                return False
            return await self._swap(engine, step.unit, step.reason)
        if self._filling is None and not self._dropping:
            coming = next_fetch(slot, units, self.policy)
            self._fetch(engine, coming, to_drop(slot, units, self.policy, coming))
        return True

    def _has_fresh_waiter(self, unit: str) -> bool:
        """Whether somebody waits for a unit who was not put back: else two would do it in turn."""
        return any(
            not ticket.again
            for name in self._units[unit].experts
            for ticket in self._queue.waiting_for(name)
        )

    async def _swap(self, engine: SwappingEngine, unit: str, reason: str) -> bool:
        began_s = time.monotonic()
        # Neither held nor running until that is done: it can't be evicted meanwhile.
        self._known[unit].tier = Residency.LOADING
        try:
            done = await engine.swap_in(unit)
        except EngineDeadError as error:
            self._record_engine_death(unit, error)
            return False
        except CoeError as error:
            if engine.failure() is not None:
                self._record_engine_death(unit, error)
                return False
            self._fail_unit(unit, error.message)
            if self._in_use(unit):
                self._known[unit].tier = Residency.HOST
                return True
            with suppress(CoeError):
                await self._forget(engine, unit)
            return True
        if not done.ok:
            self.canary_failures += 1
            log.error("the weights of %s are not as they were loaded; starting another", unit)
            self._respawn_for(unit, "canary")
            return False
        known = self._known[unit]
        known.deaths = 0
        known.swapped(done.swap_s, started=done.started)
        old = self._unit
        self._known[old].tier = Residency.HOST
        self._set_unit(old, Residency.HOST)
        self._note(Swap(unit, done.method, reason, began_s, done.swap_s))
        self._run_unit(unit)
        return True

    def _respawn_for(self, unit: str, reason: str) -> None:
        """Leave this engine; the next one starts with `unit`."""
        self._freeze_held()
        self._respawn = unit, reason, time.monotonic()
        self._start_for(unit)

    def _start_for(self, unit: str) -> None:
        """The next engine starts with the weights that a unit runs on."""
        self._unit = self._units[unit].needs or unit
        self._meant = unit if unit != self._unit else ""

    def _run_unit(self, unit: str) -> None:
        assert self._report is not None
        self._unit = unit
        self._since_s = time.monotonic()
        self._closed_s = None
        self._known[unit].tier = Residency.DEVICE
        self._known[unit].failed_until = 0.0
        self._known[unit].wanted = False
        for name in self._units[unit].experts:
            self._states[name] = ExpertState(
                Residency.DEVICE,
                max_model_len=self._report.max_model_len,
                engine={"name": self._report.engine, **self._report.details},
            )
        self._open = True
        self._grant()
        self._changed()

    # --- starts that fail

    def _retry_s(self) -> float:
        # Somebody else may be able to start meanwhile.
        now_s = time.monotonic()
        self._known[self._unit].failed_until = now_s + RETRY_S
        asyncio.get_running_loop().call_later(RETRY_S, self._clear_failure, self._unit)
        able = [
            name
            for name, known in self._known.items()
            if known.failed_until <= now_s
            and name not in self._retired
            and self._known[self._units[name].needs or name].failed_until <= now_s
        ]
        if not able:
            return super()._retry_s()
        self._start_for(max(able, key=self._waiting_in))
        return 0.5

    def _set_all(self, state: Residency, reason: str) -> None:
        # An engine that can't start is the running unit's fault alone.
        self._set_unit(self._unit, state, reason)
