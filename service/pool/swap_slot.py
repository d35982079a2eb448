"""A slot that several units share, one running at a time.

The planner decides; this module does what it says: closes the gate, waits for the
running requests, exchanges the weights (in place where the engine can, with a new
engine where not), opens the gate. No request is dropped, and none is answered by
another unit's weights.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from service.engine.protocol import SwappingEngine
from service.errors import CoeError, Conflict, EngineDead
from service.link.snapshot import ExpertState
from service.pool.planner import (
    Next,
    Policy,
    SlotView,
    UnitView,
    bounded,
    next_fetch,
    next_step,
    to_drop,
)
from service.pool.queues import Ticket
from service.pool.slot import Slot
from service.types import Residency

log = logging.getLogger("coe.pool")

_TICK_S = 0.05
_EWMA = 0.3
_DEMAND_HALF_S = 30.0
_RETRY_S = 30.0
_SWAPS_KEPT = 64
# A unit in whose fill or exchange the engine died this often in a row is at fault.
_DEATHS = 2


@dataclass(frozen=True, slots=True)
class Unit:
    """An expert with full weights, and the adapters that come with it."""

    name: str
    experts: tuple[str, ...]
    pinned: bool = False


@dataclass(slots=True)
class _Known:
    """What is known of one unit in this slot."""

    tier: Residency = Residency.DISK
    host_bytes: int = 0
    fill_s: float = 0.0
    swap_s: float = 0.0
    demand: float = 0.0
    demand_at: float = 0.0
    failed_until: float = 0.0
    deaths: int = 0
    pinned: bool = False
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap that happened: times are `time.monotonic` seconds."""

    unit: str
    method: str
    reason: str
    began_s: float
    swap_s: float


class SwapSlot(Slot):
    """An engine and the units that take turns in it.

    `build_for(unit)` makes an engine that starts with that unit running.
    `size_guess_bytes` and `fill_guess_s` stand in until a unit was measured.
    """

    def __init__(
        self,
        units: tuple[Unit, ...],
        build_for: Callable[[str], SwappingEngine],
        policy: Policy,
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        size_guess_bytes: int,
        fill_guess_s: float,
        swap_guess_s: float,
        changed: Callable[[], None],
    ) -> None:
        super().__init__(
            tuple(name for unit in units for name in unit.experts),
            lambda: build_for(self._unit),
            capacity=capacity,
            max_waiting=max_waiting,
            start_guess_s=start_guess_s,
            changed=changed,
        )
        self._units = {unit.name: unit for unit in units}
        self._unit_of = {name: unit.name for unit in units for name in unit.experts}
        self._known = {
            unit.name: _Known(
                host_bytes=size_guess_bytes,
                fill_s=fill_guess_s,
                swap_s=swap_guess_s,
                pinned=unit.pinned,
            )
            for unit in units
        }
        self._policy = policy
        self._unit = units[0].name
        self._since_s = 0.0
        self._open = False
        self._drain_s = 0.0
        self._closed_s: float | None = None
        self._gone = False
        self._event = asyncio.Event()
        self._filling: asyncio.Task[None] | None = None
        self._filling_unit: str | None = None
        self.swaps: list[Swap] = []
        self.counts: dict[tuple[str, str, str], int] = {}
        self.canary_failures = 0
        self._states = {
            name: ExpertState(
                Residency.LOADING if self._unit_of[name] == self._unit else Residency.DISK
            )
            for name in self.experts
        }

    # --- requests

    def _ready(self) -> set[str]:
        return super()._ready() if self._open else set()

    def _arrived(self, ticket: Ticket) -> None:
        self.demand(ticket.expert, 1.0, ticket.arrived_s)

    def demand(self, expert: str, amount: float, now_s: float) -> None:
        """Utility asked of an expert: what is served, and what gateways would have sent."""
        known = self._known[self._unit_of[expert]]
        known.demand = _faded(known, now_s) + amount
        known.demand_at = now_s
        self._event.set()

    def _left(self) -> None:
        self._event.set()

    def _swap_s_since(self, since_s: float) -> float:
        return sum(
            swap.swap_s for swap in reversed(self.swaps) if swap.began_s + swap.swap_s > since_s
        )

    # --- the engine's life

    async def _bring_up(self, engine: SwappingEngine) -> None:  # type: ignore[override]
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

    async def _watch(self, engine: SwappingEngine) -> None:  # type: ignore[override]
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
            slot, self._unit_views(now_s, engine.exchangeable), self._policy, self._start_s
        )
        step = next_step(slot, units, self._policy)
        if step.act is Next.STAY:
            self._closed_s = None
            if not self._open:
                self._open = True
                self._grant()
        elif step.act is Next.CLOSE:
            if self._open or self._closed_s is None:
                self._closed_s = now_s
            self._open = False
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
            coming = next_fetch(slot, units, self._policy)
            self._fetch(engine, coming, to_drop(slot, units, self._policy, coming))
        return True

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
        self._note(Swap(unit, "inplace", reason, began_s, done.swap_s))
        self._run_unit(unit)
        return True

    def _respawn_for(self, unit: str, reason: str) -> None:
        """Leave this engine; the next one starts with `unit`."""
        self._note(Swap(unit, "respawn", reason, time.monotonic(), self._start_s))
        self._unit = unit

    def _note(self, swap: Swap) -> None:
        self.swaps.append(swap)
        del self.swaps[:-_SWAPS_KEPT]
        key = (swap.unit, swap.method, swap.reason)
        self.counts[key] = self.counts.get(key, 0) + 1

    def _run_unit(self, unit: str) -> None:
        assert self._report is not None
        self._unit = unit
        self._since_s = time.monotonic()
        self._closed_s = None
        self._known[unit].tier = Residency.DEVICE
        self._known[unit].failed_until = 0.0
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

    def _fetch(self, engine: SwappingEngine, unit: str | None, drops: list[str]) -> None:
        """Begin to bring a unit to host memory, once others have made room for it."""
        for name in drops:
            # From here on nobody swaps to it.
            self._known[name].tier = Residency.DISK
            self._set_unit(name, Residency.DISK)
        if unit is not None:
            self._filling_unit = unit
            self._set_unit(unit, Residency.LOADING)
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
        known.failed_until = time.monotonic() + _RETRY_S
        self._set_unit(unit, Residency.FAILED, reason)
        self._refuse_waiting()
        asyncio.get_running_loop().call_later(_RETRY_S, self._forgive, unit)

    def _forgive(self, unit: str) -> None:
        if self._known[unit].failed_until > time.monotonic() + _TICK_S:
            return
        if all(self._states[n].state is Residency.FAILED for n in self._units[unit].experts):
            self._set_unit(unit, Residency.DISK)

    def _set_unit(self, unit: str, state: Residency, reason: str = "") -> None:
        for name in self._units[unit].experts:
            self._states[name] = replace(self._states[name], state=state, reason=reason, eta_s=0.0)
        self._changed()

    def _retry_s(self) -> float:
        # Somebody else may be able to start meanwhile.
        now_s = time.monotonic()
        self._known[self._unit].failed_until = now_s + _RETRY_S
        asyncio.get_running_loop().call_later(_RETRY_S, self._forgive, self._unit)
        able = [name for name, known in self._known.items() if known.failed_until <= now_s]
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
            # As if somebody had asked for it: the planner fetches it when there is room.
            known.wanted = True
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
            await engine.drop(unit)  # type: ignore[attr-defined]
        self._event.set()

    def details(self) -> dict[str, dict[str, Any]]:
        """Each expert's residency in full, its last swap included."""
        told = super().details()
        last = {swap.unit: swap for swap in self.swaps}
        for name, entry in told.items():
            unit = self._unit_of[name]
            known = self._known[unit]
            entry |= {
                "unit": unit,
                "pinned": known.pinned,
                "host_bytes": known.host_bytes if known.tier is not Residency.DISK else 0,
                "fill_s": round(known.fill_s, 3),
                "swap_s": round(known.swap_s, 4),
            }
            if (swap := last.get(unit)) is not None:
                ago_s = round(time.monotonic() - swap.began_s, 1)
                entry["last_swap"] = {
                    "method": swap.method,
                    "reason": swap.reason,
                    "swap_s": round(swap.swap_s, 4),
                    "ago_s": ago_s,
                }
        return told

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps by unit, method and reason."""
        return dict(self.counts)

    # --- what it tells

    def states(self) -> dict[str, ExpertState]:
        """Each expert's state, with the time until it could answer if it were its turn."""
        told = {}
        left_s = max(0.5, self._start_s - (time.monotonic() - self._started_at))
        for name, state in self._states.items():
            known = self._known[self._unit_of[name]]
            if self._engine is None and state.state is Residency.LOADING:
                eta_s = float(round(left_s))
            elif state.state is Residency.HOST:
                eta_s = round(known.swap_s, 3)
            elif state.state in (Residency.DISK, Residency.LOADING):
                eta_s = round(known.fill_s + known.swap_s, 1)
            else:
                eta_s = 0.0
            told[name] = replace(state, eta_s=eta_s, swap_s=round(known.swap_s, 3))
        return told

    def _waiting_in(self, unit: str) -> int:
        return sum(self._queues.counts(name)[0] for name in self._units[unit].experts)

    def _slot_view(self, now_s: float) -> SlotView:
        running = sum(self._queues.counts(name)[1] for name in self._units[self._unit].experts)
        return SlotView(
            self._unit,
            now_s - self._since_s,
            running,
            self._waiting_in(self._unit),
            self._drain_s,
            closing=self._closed_s is not None,
        )

    def _unit_views(self, now_s: float, exchangeable: frozenset[str]) -> list[UnitView]:
        views = []
        for name, unit in self._units.items():
            known = self._known[name]
            if known.failed_until > now_s and name != self._unit:
                continue
            waiting = [t for expert in unit.experts for t in self._queues.waiting_for(expert)]
            at_host = known.tier in (Residency.HOST, Residency.DEVICE)
            views.append(
                UnitView(
                    name=name,
                    tier=known.tier if self._filling_unit != name else Residency.LOADING,
                    waiting=len(waiting),
                    waiting_tokens=sum(ticket.tokens for ticket in waiting),
                    oldest_s=max((now_s - t.arrived_s for t in waiting), default=0.0),
                    # Asked for by hand counts as asked for just now.
                    demand_per_s=max(_faded(known, now_s), float(known.wanted)) / _DEMAND_HALF_S,
                    host_bytes=known.host_bytes,
                    bring_s=known.fill_s,
                    swap_s=(known.swap_s + (0.0 if at_host else known.fill_s))
                    if name in exchangeable
                    else self._start_s,
                    pinned=known.pinned,
                    exchangeable=name in exchangeable,
                )
            )
        return views


def _faded(known: _Known, now_s: float) -> float:
    """Requests seen, each one's weight halving every 30 s."""
    if not known.demand:
        return 0.0
    faded: float = known.demand * 0.5 ** ((now_s - known.demand_at) / _DEMAND_HALF_S)
    return faded
