"""What a shared slot knows of its units, and what it tells.

`swap_slot` does what the planner says; here are the units, which may come and go, the
views that the planner decides by, and the states that gateways and people see.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from service.engine.protocol import SwappingEngine
from service.errors import CoeError, Conflict
from service.link.snapshot import ExpertState
from service.pool.lease import Again
from service.pool.placement import Place
from service.pool.planner import Policy, SlotView, UnitView, bounded
from service.pool.queues import Ticket
from service.pool.slot import Slot
from service.pool.units import Known, Swap, Unit
from service.types import Residency

_SWAPS_KEPT = 64
# Bringing a unit that has no weights of its own is but a few kilobytes.
_LIGHT_FILL_S = 0.05


class SharedSlot(Slot[SwappingEngine]):
    """A slot with units of which one runs at a time."""

    def __init__(
        self,
        units: Sequence[Unit],
        build_for: Callable[[str], SwappingEngine],
        policy: Policy,
        *,
        capacity: int,
        max_waiting: int,
        start_guess_s: float,
        guess: Known,
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
        self._units: dict[str, Unit] = {}
        self._unit_of: dict[str, str] = {}
        self._known: dict[str, Known] = {}
        self._guess = guess
        self._states = {}
        self.policy = policy
        self._unit = units[0].name
        self._since_s = 0.0
        self._open = False
        self._drain_s = 0.0
        self._closed_s: float | None = None
        self._event = asyncio.Event()
        self._filling_unit: str | None = None
        # Bytes that are on their way out of the engine, by unit.
        self._dropping: dict[str, int] = {}
        # Units that are to go, and who waits until they are gone.
        self._retired: dict[str, asyncio.Event] = {}
        self.swaps: list[Swap] = []
        self.counts: dict[tuple[str, str, str], int] = {}
        self.canary_failures = 0
        for unit in units:
            self.take_in(unit)
        self._set_unit(self._unit, Residency.LOADING)

    # --- units come and go

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that are here."""
        return tuple(self._units.values())

    @property
    def running_unit(self) -> str:
        """The unit that runs, or that the next engine starts with."""
        return self._unit

    def unit_of(self, expert: str) -> Unit:
        """The unit that an expert belongs to."""
        return self._units[self._unit_of[expert]]

    def set_pinned(self, expert: str, pinned: bool) -> None:
        """Whether an expert's unit stays in host memory, whatever else wants the room."""
        self._known[self._unit_of[expert]].pinned = pinned
        self._event.set()

    def _is_to_come(self, unit: str) -> bool:
        """Whether a unit that an operator wants is not held yet. Raises Conflict if it can't be."""
        known = self._known[unit]
        if known.tier is not Residency.DISK:
            return False
        now_s = time.monotonic()
        if known.failed_until > now_s:
            raise Conflict(f"expert {unit!r} could not be loaded: {self._states[unit].reason}")
        if (engine := self._engine) is None:
            return unit != self._unit  # the next engine starts with that one
        views = self._unit_views(now_s, engine.exchangeable)
        beside = bounded(self._slot_view(now_s), views, self.policy, self._start_s)
        if not any(view.name == unit and view.exchangeable for view in beside):
            raise Conflict(
                f"expert {unit!r} can't be held beside {self._unit!r}: it needs an engine of its "
                "own, or more host_bytes; it is started when it is asked for"
            )
        return True

    def take_in(self, unit: Unit, known: Known | None = None) -> None:
        """One more unit, and what another slot knew of it."""
        if known is None:
            size = unit.size_bytes or (0 if unit.needs else self._guess.host_bytes)
            fill_s = min(self._guess.fill_s, _LIGHT_FILL_S) if unit.needs else self._guess.fill_s
            known = replace(self._guess, host_bytes=size, fill_s=fill_s, pinned=unit.pinned)
        known.begins_anew()
        self._units[unit.name] = unit
        self._known[unit.name] = known
        for name in unit.experts:
            self._unit_of[name] = unit.name
            self._states[name] = ExpertState(Residency.DISK)
            self._queues.welcome(name)
        self._recount()

    def _forget_unit(self, unit: str) -> Known:
        gone = self._units.pop(unit)
        for name in gone.experts:
            del self._unit_of[name], self._states[name]
        self._recount()
        return self._known.pop(unit)

    def _recount(self) -> None:
        self.experts = tuple(name for unit in self._units.values() for name in unit.experts)
        self._event.set()
        self._changed()

    def _is_held(self, unit: str) -> bool:
        """Whether a unit is in host memory, running or not."""
        return self._known[unit].tier in (Residency.HOST, Residency.DEVICE)

    def held_bytes(self) -> int:
        """Bytes of weights that are in host memory, or on their way to it or out of it."""
        there = {self._weighs(self._unit)} | {
            name
            for name, known in self._known.items()
            if known.tier is not Residency.DISK or name == self._filling_unit
        }
        held = sum(self._known[n].host_bytes for n in there if not self._units[n].needs)
        leaving = sum(self._dropping.values())
        if self._filling_unit is not None and leaving and not self._units[self._filling_unit].needs:
            # It comes when these have gone.
            return max(held, held - self._known[self._filling_unit].host_bytes + leaving)
        return held + leaving

    def _weighs(self, unit: str) -> str:
        """The unit whose weights a unit runs on."""
        return self._units[unit].needs or unit

    def _bring_s(self, unit: str) -> float:
        """From where it is to host memory, and first the weights that it needs."""
        known = self._known[unit]
        own_s = 0.0 if self._is_held(unit) else known.fill_s
        needs = self._units[unit].needs
        return own_s + (self._bring_s(needs) if needs in self._units else 0.0)

    def _send_away(self, unit: str, why: Callable[[Ticket], CoeError | Again]) -> None:
        """Whoever waits for a unit is told."""
        for name in self._units[unit].experts:
            for ticket in self._queues.waiting_for(name):
                self._refuse(ticket, why(ticket))

    # --- requests

    def _ready(self) -> set[str]:
        return super()._ready() if self._open else set()

    def _arrived(self, ticket: Ticket) -> None:
        self.demand(ticket.expert, 1.0, ticket.arrived_s)

    def demand(self, expert: str, amount: float, now_s: float) -> None:
        """Utility asked of an expert: what is served, and what gateways would have sent."""
        self._known[self._unit_of[expert]].asked(amount, now_s)
        self._event.set()

    def _left(self) -> None:
        self._event.set()

    def _swap_s_since(self, since_s: float) -> float:
        return sum(
            swap.swap_s for swap in reversed(self.swaps) if swap.began_s + swap.swap_s > since_s
        )

    # --- what it tells

    def _note(self, swap: Swap) -> None:
        self.swaps.append(swap)
        del self.swaps[:-_SWAPS_KEPT]
        key = (swap.unit, swap.method, swap.reason)
        self.counts[key] = self.counts.get(key, 0) + 1

    def _set_unit(self, unit: str, state: Residency, reason: str = "") -> None:
        for name in self._units[unit].experts:
            self._states[name] = replace(self._states[name], state=state, reason=reason, eta_s=0.0)
        self._changed()

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
                eta_s = round(self._bring_s(self._unit_of[name]) + known.swap_s, 1)
            else:
                eta_s = 0.0
            told[name] = replace(state, eta_s=eta_s, swap_s=round(known.swap_s, 3))
        return told

    def view(self, pool_units: Iterable[str]) -> Place:
        """This slot as the pool's placement sees it."""
        now_s = time.monotonic()
        engine = self._engine
        able = engine.exchangeable if engine is not None else frozenset()
        return Place(
            self._slot_view(now_s),
            self._unit_views(now_s, able),
            frozenset(pool_units) & able,
            self._start_s,
            settled=engine is not None and self._filling_unit is None and self._is_settled(),
        )

    def _is_settled(self) -> bool:
        return not self._retired

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
            # One that failed and is held all the same has weights that others run on.
            failed = known.failed_until > now_s and known.tier is not Residency.HOST
            if (failed or name in self._retired) and name != self._unit:
                continue
            waiting = [t for expert in unit.experts for t in self._queues.waiting_for(expert)]
            views.append(
                UnitView(
                    name=name,
                    tier=known.tier if self._filling_unit != name else Residency.LOADING,
                    waiting=len(waiting),
                    waiting_tokens=sum(ticket.tokens for ticket in waiting),
                    oldest_s=max((now_s - t.arrived_s for t in waiting), default=0.0),
                    demand_per_s=known.demand_per_s(now_s),
                    host_bytes=0 if unit.needs else known.host_bytes,
                    bring_s=known.fill_s,
                    swap_s=(known.swap_s + self._bring_s(name))
                    if name in exchangeable
                    else self._start_s,
                    pinned=known.pinned,
                    exchangeable=name in exchangeable,
                    wanted=known.wanted,
                    needs=unit.needs,
                )
            )
        return views
