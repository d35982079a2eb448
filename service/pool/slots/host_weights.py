"""What a shared slot holds in host memory: bringing units there, forgetting them, by hand, too."""

from __future__ import annotations

import asyncio
import logging
import time

from service.engine.base import SwappingEngine
from service.errors import CoeError, ConflictError, EngineDeadError
from service.pool.slots.shared import SharedSlot
from service.types import Residency

log = logging.getLogger("coe.pool")

TICK_S = 0.05
RETRY_S = 30.0
# A unit in whose fill or exchange the engine died this often in a row is at fault.
_DEATHS = 2


class HostWeightSlot(SharedSlot):
    """A slot with units of which some are held beside the running one."""

    _filling: asyncio.Task[None] | None = None
    _gone = False

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
            leaving = self._dropping if unit is None else self._clearing
            leaving[name] = self._known[name].host_bytes
        if unit is not None:
            self._filling_unit = unit
            self._set_unit(unit, Residency.LOADING)
        drops = [*drops, gone] if gone else drops
        if unit is not None or drops:
            self._filling = asyncio.create_task(self._fill(engine, unit, drops))

    async def _fill(self, engine: SwappingEngine, unit: str | None, drops: list[str]) -> None:
        try:
            for name in drops:
                await engine.evict(name, for_next=unit is not None)
                self._has_left(name)
            if unit is not None:
                filled = await engine.load_to_host(unit)
                known = self._known[unit]
                known.tier = Residency.HOST
                known.host_bytes = filled.host_bytes
                known.fill_s = filled.fill_s
                known.starts = filled.starts
                known.wanted = False
                known.deaths = 0
                self._set_unit(unit, Residency.HOST)
        except Exception as error:
            why = error.message if isinstance(error, CoeError) else repr(error)
            if isinstance(error, EngineDeadError) or engine.failure() is not None:
                self._freeze_held()
                if unit is not None:
                    self._record_engine_death(unit, error)
            elif unit is not None:
                self._fail_unit(unit, why)
            else:
                log.error("could not forget %s: %s", "/".join(drops), why)
        finally:
            self._filling = self._filling_unit = None
            for name in drops:
                self._has_left(name)
            self._event.set()

    def _has_left(self, unit: str) -> None:
        self._dropping.pop(unit, None)
        self._clearing.pop(unit, None)

    def _in_use(self, unit: str) -> str:
        """A unit on whose account a unit's weights can't go, as it runs on them; or empty."""
        return next(
            (
                one.name
                for one in self._units.values()
                if one.needs == unit
                and (
                    one.name in (self._unit, self._filling_unit)
                    or self._known[one.name].tier is Residency.LOADING
                    or (self._known[one.name].pinned and self._is_held(one.name))
                )
            ),
            "",
        )

    async def _forget(self, engine: SwappingEngine, unit: str) -> None:
        """Drop a unit that is not in use, and before it those that run on its weights."""
        names = [one.name for one in self._units.values() if one.needs == unit]
        names = [*filter(self._is_held, names), unit]
        for name in names:
            known = self._known[name]
            known.tier = Residency.DISK
            if known.failed_until <= time.monotonic():
                self._set_unit(name, Residency.DISK)
            self._dropping[name] = known.host_bytes
        try:
            for name in names:
                await engine.evict(name)
        except CoeError as error:
            if isinstance(error, EngineDeadError) or engine.failure() is not None:
                self._freeze_held()
            raise
        finally:
            for name in names:
                self._dropping.pop(name, None)

    def _record_engine_death(self, unit: str, error: Exception) -> None:
        """The engine died while it took in a unit's weights: perhaps not that unit's fault."""
        self._freeze_held()
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
        known.failed_until = time.monotonic() + RETRY_S
        self._set_unit(unit, Residency.FAILED, reason)
        self._refuse_waiting()
        asyncio.get_running_loop().call_later(RETRY_S, self._clear_failure, unit)

    def _clear_failure(self, unit: str) -> None:
        if unit not in self._known:
            return  # it went to another slot, or for good
        if self._known[unit].failed_until > time.monotonic() + TICK_S:
            return
        if all(self._states[n].state is Residency.FAILED for n in self._units[unit].experts):
            self._set_unit(unit, self._known[unit].tier)

    # --- operating it

    async def operate(self, act: str, expert: str) -> None:
        """load, evict, pin or unpin. Raises ConflictError where the present state forbids it."""
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
                raise ConflictError(f"expert {expert!r} is {why} and can't be evicted")
            engine = self._engine
            if engine is None:
                raise ConflictError("the slot's engine is starting; nothing is held")
            if name := self._in_use(unit):
                raise ConflictError(f"expert {name!r} runs on it or is pinned: it can't be evicted")
            known.wanted = False
            known.demand = 0.0
            await self._forget(engine, unit)
        self._event.set()
