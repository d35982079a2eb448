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

from service.engine.protocol import SwappingEngine
from service.errors import CoeError, Conflict, EngineDead, UnknownModel
from service.link.snapshot import ExpertState
from service.pool.lease import Again
from service.pool.planner import LATE, Next, UnitView, bounded, next_fetch, next_step, to_drop
from service.pool.shared_slot import SharedSlot
from service.pool.units import Known, Swap
from service.types import Residency

log = logging.getLogger("coe.pool")

_TICK_S = 0.05
_EWMA = 0.3
_RETRY_S = 30.0
# A unit in whose fill or exchange the engine died this often in a row is at fault.
_DEATHS = 2


class SwapSlot(SharedSlot):
    """An engine and the units that take turns in it.

    `build_for(unit)` makes an engine that starts with that unit running. `guess` stands in
    until a unit was measured.
    """

    _filling: asyncio.Task[None] | None = None
    _gone = False

    # --- units come and go

    def hand_over(self, unit: str) -> Known | None:
        """Give a unit to another slot: what is known of it, or None where it can't go now.

        Who waits for it is put back, and finds it where it is then.
        """
        if unit in (self._unit, self._filling_unit) or self._filling is not None:
            return None
        if self._known[unit].tier not in (Residency.DISK, Residency.HOST):
            return None
        self._send_away(unit, lambda ticket: Again(ticket.arrived_s))
        return self._let_go(unit)

    def _let_go(self, unit: str) -> Known:
        known = self._forget_unit(unit)
        if known.tier is Residency.HOST and self._engine is not None:
            self._fetch(self._engine, None, [], gone=unit)
        return known

    async def retire(self, unit: str, why: str) -> None:
        """A unit goes for good: who waits for it is told why, who runs is let end.

        Returns when nothing of it is left. There must be another unit to run.
        """
        self._send_away(unit, lambda _: UnknownModel(why))
        if self._engine is None and unit != self._unit:
            self._let_go(unit)
            return
        gone = self._retired[unit] = asyncio.Event()
        self._event.set()
        await gone.wait()

    async def _leave_retired(self, engine: SwappingEngine, units: list[UnitView]) -> bool:
        """Let go of units that are to go. False: the one that comes needs another engine."""
        for unit in [name for name in self._retired if name != self._unit]:
            if self._filling is not None:
                return True
            self._let_go(unit)
            self._retired.pop(unit).set()
        if self._unit not in self._retired or self._slot_view(time.monotonic()).running:
            return True
        heirs = [one for one in units if one.name not in self._retired]
        if not heirs or self._filling is not None:
            return True
        heir = max(
            heirs,
            key=lambda one: (one.waiting, one.tier is Residency.HOST, one.demand_per_s, one.name),
        )
        self._open = False
        if heir.tier is Residency.HOST:
            return await self._swap(engine, heir.name, "removed")
        if not heir.exchangeable:
            self._respawn_for(heir.name, "removed")
            return False
        slot = self._slot_view(time.monotonic())
        self._fetch(engine, heir.name, to_drop(slot, units, self.policy, heir.name))
        return True

    # --- the engine's life

    async def _bring_up(self, engine: SwappingEngine) -> None:
        """Start the engine with the unit that is to run."""
        began_s = time.monotonic()
        self._emptied()
        report = await engine.start()
        self._engine, self._report = engine, report
        for name in self._units[self._unit].experts:
            await engine.load(name)
        self._start_s = time.monotonic() - began_s
        self._failed_starts = 0
        self._has_worked = True
        self._run_unit(self._unit)

    def _emptied(self) -> None:
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
                    async with asyncio.timeout(_TICK_S):
                        await self._event.wait()
        finally:
            self._open = False
            if self._filling is not None:
                self._filling.cancel()
                await asyncio.gather(self._filling, return_exceptions=True)
                self._filling = self._filling_unit = None
        if (why := engine.failure()) is not None:
            log.error("engine of %s died (%s); starting another", self._unit, why)
        self._engine = None
        self._emptied()

    def lost(self) -> None:
        """A request saw the engine die."""
        super().lost()
        self._event.set()

    async def _steer(self, engine: SwappingEngine) -> bool:
        """One look and what follows from it. False: this engine can't run who is next."""
        now_s = time.monotonic()
        slot = self._slot_view(now_s)
        units = bounded(
            slot, self._unit_views(now_s, engine.exchangeable), self.policy, self._start_s
        )
        if self._retired:
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
            if self.policy.preempt and step.reason == LATE and self._first_comes(step.unit):
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
        if self._filling is None:
            coming = next_fetch(slot, units, self.policy)
            self._fetch(engine, coming, to_drop(slot, units, self.policy, coming))
        return True

    def _first_comes(self, unit: str) -> bool:
        """Whether somebody waits for a unit who was not put back: else two would do it in turn."""
        return any(
            not ticket.again
            for name in self._units[unit].experts
            for ticket in self._queues.waiting_for(name)
        )

    async def _swap(self, engine: SwappingEngine, unit: str, reason: str) -> bool:
        began_s = time.monotonic()
        # Neither held nor running until that is done: it can't be evicted meanwhile.
        self._known[unit].tier = Residency.LOADING
        try:
            done = await engine.exchange(unit)
        except EngineDead as error:
            self._died_with(unit, error)
            return False
        except CoeError as error:
            if engine.failure() is not None:
                self._died_with(unit, error)
                return False
            self._fail_unit(unit, error.message)
            with suppress(CoeError):
                await engine.drop(unit)
            return True
        if not done.ok:
            self.canary_failures += 1
            log.error("the weights of %s are not as they were loaded; starting another", unit)
            self._respawn_for(unit, "canary")
            return False
        known = self._known[unit]
        known.deaths = 0
        known.swap_s += _EWMA * (done.swap_s - known.swap_s)
        old = self._unit
        self._known[old].tier = Residency.HOST
        self._set_unit(old, Residency.HOST)
        self._note(Swap(unit, done.method, reason, began_s, done.swap_s))
        self._run_unit(unit)
        return True

    def _respawn_for(self, unit: str, reason: str) -> None:
        """Leave this engine; the next one starts with `unit`."""
        self._note(Swap(unit, "respawn", reason, time.monotonic(), self._start_s))
        self._unit = unit

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

    # --- host memory

    def _fetch(
        self, engine: SwappingEngine, unit: str | None, drops: list[str], gone: str = ""
    ) -> None:
        """Begin to bring a unit to host memory, once others have made room for it.

        `gone`: a unit that isn't this slot's any more, to be forgotten, too.
        """
        for name in drops:
            # From here on nobody swaps to it.
            self._known[name].tier = Residency.DISK
            self._set_unit(name, Residency.DISK)
        if unit is not None:
            self._filling_unit = unit
            self._set_unit(unit, Residency.LOADING)
        drops = [*drops, gone] if gone else drops
        if unit is not None or drops:
            self._filling = asyncio.create_task(self._fill(engine, unit, drops))

    async def _fill(self, engine: SwappingEngine, unit: str | None, drops: list[str]) -> None:
        try:
            for name in drops:
                await engine.drop(name, for_next=unit is not None)
            if unit is not None:
                filled = await engine.fill(unit)
                known = self._known[unit]
                known.tier = Residency.HOST
                known.host_bytes = filled.host_bytes
                known.fill_s = filled.fill_s
                known.wanted = False
                known.deaths = 0
                self._set_unit(unit, Residency.HOST)
        except Exception as error:
            why = error.message if isinstance(error, CoeError) else repr(error)
            if isinstance(error, EngineDead) or engine.failure() is not None:
                if unit is not None:
                    self._died_with(unit, error)
            elif unit is not None:
                self._fail_unit(unit, why)
            else:
                log.error("could not forget %s: %s", "/".join(drops), why)
        finally:
            self._filling = self._filling_unit = None
            self._event.set()

    def _died_with(self, unit: str, error: Exception) -> None:
        """The engine died while it took in a unit's weights: perhaps not that unit's fault."""
        known = self._known[unit]
        known.deaths += 1
        if known.deaths >= _DEATHS:
            known.deaths = 0
            self._fail_unit(unit, f"the engine died while it loaded it ({error})")
        else:
            self._set_unit(unit, Residency.DISK)
        self._gone = True
        self.lost()

    def _fail_unit(self, unit: str, reason: str) -> None:
        log.error("expert %s failed: %s", unit, reason)
        known = self._known[unit]
        known.tier = Residency.DISK
        known.wanted = False
        known.failed_until = time.monotonic() + _RETRY_S
        self._set_unit(unit, Residency.FAILED, reason)
        self._refuse_waiting()
        asyncio.get_running_loop().call_later(_RETRY_S, self._forgive, unit)

    def _forgive(self, unit: str) -> None:
        if unit not in self._known:
            return  # it went to another slot, or for good
        if self._known[unit].failed_until > time.monotonic() + _TICK_S:
            return
        if all(self._states[n].state is Residency.FAILED for n in self._units[unit].experts):
            self._set_unit(unit, Residency.DISK)

    def _retry_s(self) -> float:
        # Somebody else may be able to start meanwhile.
        now_s = time.monotonic()
        self._known[self._unit].failed_until = now_s + _RETRY_S
        asyncio.get_running_loop().call_later(_RETRY_S, self._forgive, self._unit)
        able = [
            name
            for name, known in self._known.items()
            if known.failed_until <= now_s and name not in self._retired
        ]
        if not able:
            return super()._retry_s()
        self._unit = max(able, key=self._waiting_in)
        return 0.5

    def _set_all(self, state: Residency, reason: str) -> None:
        # An engine that can't start is the running unit's fault alone.
        self._set_unit(self._unit, state, reason)

    # --- operating it

    async def operate(self, act: str, expert: str) -> None:
        """load, evict, pin or unpin. Raises Conflict where the present state forbids it."""
        unit = self._unit_of[expert]
        known = self._known[unit]
        if act == "pin":
            known.pinned = True
        elif act == "unpin":
            known.pinned = False
        elif act == "load":
            known.wanted = self._is_to_come(unit)
        else:
            if unit == self._unit or known.pinned or known.tier is not Residency.HOST:
                why = "running" if unit == self._unit else "pinned" if known.pinned else "not held"
                raise Conflict(f"expert {expert!r} is {why} and can't be evicted")
            engine = self._engine
            if engine is None:
                raise Conflict("the slot's engine is starting; nothing is held")
            known.tier = Residency.DISK
            known.wanted = False
            known.demand = 0.0
            self._set_unit(unit, Residency.DISK)
            await engine.drop(unit)
        self._event.set()
