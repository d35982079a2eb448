"""What a shared slot knows of its units, and what it tells.

`swap_slot` does what the planner says; here are the units, which may come and go, the
views that the planner decides by, and the states that gateways and people see.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from service.engine.base import SwappingEngine
from service.errors import CoeError, ConflictError
from service.pool.lease import LeaseRevokedError
from service.pool.placement import Place
from service.pool.planner import SlotView, SwapPolicy, UnitView, bounded
from service.pool.queue import Ticket
from service.pool.slots.base import BaseSlot
from service.pool.units import Swap, Unit, UnitState
from service.rpc.snapshot import ExpertState
from service.types import Residency

_SWAPS_KEPT = 64
# Bringing a unit that has no weights of its own is but a few kilobytes.
_LIGHT_FILL_S = 0.05


class SharedSlot(BaseSlot[SwappingEngine]):
    """A slot with units of which one runs at a time."""

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
    ) -> None:
        """`apart`: until an engine has told, each unit with weights is taken to need its own."""
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
        self._known: dict[str, UnitState] = {}
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
        # Bytes that are on their way out of the engine, by unit; and those that go so that
        # `_filling_unit` can come.
        self._dropping: dict[str, int] = {}
        self._clearing: dict[str, int] = {}
        # Whether there is an engine's process, or room was made for one; and what an engine that
        # is being stopped held at last: until it has ended its memory is not free.
        self._occupied = False
        self._ending_bytes: int | None = None
        self._stop_s = 0.0
        # The unit that the engine was started with.
        self._first = ""
        # What engines that started with a unit can run, as they told.
        self._apart = apart
        self._able: dict[str, frozenset[str]] = {}
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
        """Whether a unit that an operator wants is not held yet.

        Raises ConflictError if it can't be.
        """
        known = self._known[unit]
        if known.tier is not Residency.DISK:
            return False
        now_s = time.monotonic()
        if known.failed_until > now_s:
            raise ConflictError(f"expert {unit!r} could not be loaded: {self._states[unit].reason}")
        if (engine := self._engine) is None:
            return unit != self._unit  # the next engine starts with that one
        views = self._unit_views(now_s, engine.swappable_experts)
        beside = bounded(self._slot_view(now_s), views, self.policy)
        if not any(view.name == unit and view.exchangeable for view in beside):
            raise ConflictError(
                f"expert {unit!r} can't be held beside {self._unit!r}: it needs an engine of its "
                "own, or more host_bytes; it is started when it is asked for"
            )
        return True

    def take_in(self, unit: Unit, known: UnitState | None = None) -> None:
        """One more unit, and what another slot knew of it."""
        if known is None:
            size = unit.size_bytes or (0 if unit.needs else self._guess.host_bytes)
            fill_s = min(self._guess.fill_s, _LIGHT_FILL_S) if unit.needs else self._guess.fill_s
            known = replace(self._guess, host_bytes=size, fill_s=fill_s, pinned=unit.pinned)
        known.reset_residency()
        self._units[unit.name] = unit
        self._known[unit.name] = known
        for name in unit.experts:
            self._unit_of[name] = unit.name
            self._states[name] = ExpertState(Residency.DISK)
            self._queue.add_expert(name)
        self._recount()

    def _forget_unit(self, unit: str) -> UnitState:
        gone = self._units.pop(unit)
        self._able.pop(unit, None)
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
        """Bytes of weights that are in host memory, or on their way to it or out of it.

        Those of an engine that is still to start count from when room was made for it.
        """
        if self._ending_bytes is not None:
            return self._ending_bytes
        if not self._occupied:
            return 0
        there = {self._weight_owner(self._unit)} | {
            name for name, known in self._known.items() if known.tier is not Residency.DISK
        }
        coming = self._filling_unit
        held = sum(
            self._known[name].host_bytes
            for name in there
            if not self._units[name].needs and name != coming
        )
        arriving = 0
        if coming is not None and not self._units[coming].needs:
            arriving = self._known[coming].host_bytes
        # It comes when those that make room for it have gone, and not before.
        return held + sum(self._dropping.values()) + max(arriving, sum(self._clearing.values()))

    def _freeze_held(self) -> None:
        """The engine died or is given up: until it has been stopped, all that it held is there."""
        if self._ending_bytes is None:
            self._ending_bytes = self.held_bytes()

    def _weight_owner(self, unit: str) -> str:
        """The unit whose weights a unit runs on."""
        return self._units[unit].needs or unit

    def _fetch_time_s(self, unit: str) -> float:
        """From where it is to host memory, and first the weights that it needs."""
        known = self._known[unit]
        own_s = 0.0 if self._is_held(unit) else known.fill_s
        needs = self._units[unit].needs
        return own_s + (self._fetch_time_s(needs) if needs in self._units else 0.0)

    def _start_of(self, unit: str) -> float:
        """What another engine takes to run a unit, in s, once there is none."""
        owner = self._weight_owner(unit)
        known = self._known.get(owner)
        start_s = (known.start_s if known is not None else 0.0) or self._start_s
        if owner == unit:
            return start_s
        return start_s + self._known[unit].fill_s + self._known[unit].swap_s

    def _stop_of(self, unit: str) -> float:
        """What the end of an engine that was started with a unit takes, in s."""
        known = self._known.get(unit)
        return (known.stop_s if known is not None else 0.0) or self._stop_s

    def _respawn_to(self, unit: str) -> float:
        """What leaving this engine for another that runs a unit takes, in s."""
        return self._stop_of(self._first) + self._start_of(unit)

    def _can_run(self) -> frozenset[str]:
        """The units that this slot's engine can run; while one starts, as far as that is known."""
        if self._engine is not None:
            return self._engine.swappable_experts
        if (told := self._able.get(self._unit)) is not None:
            return told
        if not self._apart:
            return frozenset(self._units)
        return frozenset(
            n for n in self._units if self._weight_owner(n) == self._weight_owner(self._unit)
        )

    def _reject_waiting(
        self, unit: str, why: Callable[[Ticket], CoeError | LeaseRevokedError]
    ) -> None:
        """Whoever waits for a unit is told."""
        for name in self._units[unit].experts:
            self._queue.refuse_waiting(name, why)

    # --- requests

    def _ready(self) -> set[str]:
        return super()._ready() if self._open else set()

    def _arrived(self, ticket: Ticket) -> None:
        self.demand(ticket.expert, 1.0, ticket.arrived_s)

    def demand(self, expert: str, amount: float, now_s: float) -> None:
        """Utility asked of an expert: what is served, and what gateways would have sent."""
        self._known[self._unit_of[expert]].record_demand(amount, now_s)
        self._event.set()

    def _left(self) -> None:
        self._event.set()

    def _swap_s_since(self, since_s: float) -> float:
        # What of each was after that.
        return sum(
            min(swap.swap_s, max(0.0, swap.began_s + swap.swap_s - since_s)) for swap in self.swaps
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
        """Each expert's state, with the time until it could answer if it were its turn.

        Both times are those that the planner reckons with: where another engine must be started,
        what that takes. swap_s: of the ways there and back again the mean.
        """
        now_s = time.monotonic()
        units = self._unit_views(now_s, self._can_run())
        views = bounded(self._slot_view(now_s), units, self.policy)
        able = {view.name for view in views if view.exchangeable}
        starting = self._engine is None
        left_s = self.ahead_s + self.start_left_s()
        times: dict[str, tuple[float, float]] = {}
        for unit, known in self._known.items():
            there_s, back_s = self._way(unit, able)
            bring_s = self._fetch_time_s(unit) if unit in able else 0.0
            if starting:
                # Rounded, so that a countdown is no change worth a line in every snapshot.
                after_s = 0.0 if unit == self._unit else bring_s + there_s
                eta_s = float(round(left_s + after_s))
            elif known.tier is Residency.HOST:
                eta_s = round(there_s, 3)
            else:
                eta_s = round(bring_s + there_s, 1)
            times[unit] = eta_s, round((there_s + back_s) / 2, 3)
        told = {}
        for name, state in self._states.items():
            eta_s, swap_s = times[self._unit_of[name]]
            waits = state.state in (Residency.HOST, Residency.DISK, Residency.LOADING)
            told[name] = replace(state, eta_s=eta_s if waits else 0.0, swap_s=swap_s)
        return told

    def _swap_to(self, unit: str, able: Collection[str]) -> float:
        """From where a unit's weights are now to running, in s."""
        if unit not in able:
            return self._respawn_to(unit)
        known = self._known[unit]
        return self._start_of(unit) if known.starts else known.swap_s + self._fetch_time_s(unit)

    def _start_whole_s(self) -> float:
        # Counted from when the engine before began to end.
        waits = self._turn_asked_s is not None and not self._begun
        return self._start_of(self._unit) if waits else self._respawn_to(self._unit)

    def _way(self, unit: str, able: Collection[str]) -> tuple[float, float]:
        """From the running unit to another, its weights at hand, and back. In s."""
        running = self._unit
        if unit == running:
            swap_s = self._known[unit].swap_s
            return swap_s, swap_s
        if unit not in able:
            there_s, back_s = self._start_of(unit), self._start_of(running)
            if self._engine is None:
                return self._stop_of(running) + there_s, self._stop_of(unit) + back_s
            return self._stop_of(self._first) + there_s, self._stop_of(unit) + back_s
        there, back = self._known[unit], self._known[running]
        there_s = self._start_of(unit) if there.starts else there.swap_s
        return there_s, back.swap_s if back.measured else there.swap_s

    def view(self, pool_units: Iterable[str]) -> Place:
        """This slot as the pool's placement sees it."""
        now_s = time.monotonic()
        engine = self._engine
        able = engine.swappable_experts if engine is not None else frozenset()
        return Place(
            self._slot_view(now_s),
            self._unit_views(now_s, able),
            frozenset(pool_units) & able,
            settled=engine is not None and self._filling_unit is None and self._is_settled(),
        )

    def _is_settled(self) -> bool:
        return not self._retired

    def _waiting_in(self, unit: str) -> int:
        return sum(self._queue.counts(name)[0] for name in self._units[unit].experts)

    def _slot_view(self, now_s: float) -> SlotView:
        running = sum(self._queue.counts(name)[1] for name in self._units[self._unit].experts)
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
            waiting = [t for expert in unit.experts for t in self._queue.waiting_for(expert)]
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
                    swap_s=self._swap_to(name, exchangeable),
                    pinned=known.pinned,
                    exchangeable=name in exchangeable,
                    wanted=known.wanted,
                    needs=unit.needs,
                    start_s=self._respawn_to(name),
                )
            )
        return views
