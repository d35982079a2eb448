"""Which of a pool's slots a unit belongs to. Pure.

Every unit has one slot at a time, where its requests wait and its weights may be held. It
moves when it would run sooner elsewhere: to a slot with nothing to do, or away from one
in which too much demand has met. Its weights don't move with it (each engine holds its
own), so a move costs a fetch, and must be worth that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pool.planner import SlotView, SwapPolicy, UnitView, urgency
from service.types import Residency

# A move must be worth this many times what it costs: guesses are guesses.
_MARGIN = 1.5
# And even demand out by this part of the busier slot's, so that none goes to and fro.
_EVENED = 0.25


@dataclass(frozen=True, slots=True)
class Place:
    """One slot: its state, its units, the pool's units that its engine can take in.

    settled: its engine runs, and nothing is on its way to or from its memory.
    """

    slot: SlotView
    units: Sequence[UnitView]
    fits: frozenset[str]
    settled: bool


@dataclass(frozen=True, slots=True)
class Move:
    """`unit` goes from one slot to another, by index."""

    unit: str
    source: int
    target: int


def next_move(places: Sequence[Place], policy: SwapPolicy) -> Move | None:
    """The move that is worth most, if any is worth it."""
    return _to_idle(places, policy) or _evening(places)


def _to_idle(places: Sequence[Place], policy: SwapPolicy) -> Move | None:
    """Who waits, to a slot with nothing to do: where that is sooner."""
    best: tuple[float, str, Move] | None = None
    idle = [i for i, place in enumerate(places) if place.settled and _is_idle(place)]
    if not idle:
        return None
    for s, place in enumerate(places):
        if not (place.slot.running or place.slot.waiting):
            continue  # its own turn comes at once
        for unit in _movable(place):
            if not unit.waiting:
                continue
            wait_s = _wait_s(place, unit, policy)
            for t in idle:
                cost_s = _cost_s(places[t], unit)
                if t != s and wait_s > _MARGIN * cost_s:
                    found = (wait_s - cost_s, unit.name, Move(unit.name, s, t))
                    if best is None or found[:2] > best[:2]:
                        best = found
    return best[2] if best is not None else None


def _evening(places: Sequence[Place]) -> Move | None:
    """One unit from the slot with the most demand to the one with the least."""
    loads = [sum(_load(unit) for unit in place.units) for place in places]
    heavy = max(range(len(places)), key=lambda i: (loads[i], i))
    best: tuple[float, str, Move] | None = None
    for unit in _movable(places[heavy]) if places[heavy].settled else ():
        # Its requests would have to wait for a fetch, where it is held here.
        if unit.waiting:
            continue
        for t, place in enumerate(places):
            if t == heavy or not place.settled or unit.name not in place.fits:
                continue
            gain = loads[heavy] - max(loads[heavy] - _load(unit), loads[t] + _load(unit))
            found = (gain, unit.name, Move(unit.name, heavy, t))
            if gain > _EVENED * loads[heavy] and (best is None or found[:2] > best[:2]):
                best = found
    return best[2] if best is not None else None


def _load(unit: UnitView) -> float:
    return unit.demand_per_s


def _is_idle(place: Place) -> bool:
    busy = place.slot.running or place.slot.waiting
    return not busy and not any(unit.waiting for unit in place.units)


def _movable(place: Place) -> list[UnitView]:
    # Who runs on another's weights stays with them, and they with it.
    tied = {unit.needs for unit in place.units if unit.needs}
    return [
        unit
        for unit in place.units
        if unit.name != place.slot.running_unit
        and not unit.pinned
        and not unit.needs
        and unit.name not in tied
        and unit.tier in (Residency.DISK, Residency.HOST)
    ]


def _wait_s(place: Place, unit: UnitView, policy: SwapPolicy) -> float:
    """About how long until it is this unit's turn where it is.

    How long the running unit's queue goes on nobody knows. So a wait is taken to last as
    long again as it has: who rents until that cost as much as buying pays at most twice.
    """
    slot = place.slot
    rounds = 1 + slot.waiting / max(1, slot.running)
    wait_s = max(policy.min_stay_s - slot.stayed_s, slot.drain_s * rounds, 0.0) + unit.swap_s
    mine = urgency(unit, policy)
    for other in place.units:
        first = other.waiting and other.name not in (unit.name, slot.running_unit)
        if first and urgency(other, policy) > mine:
            wait_s += other.swap_s + max(policy.min_stay_s, slot.drain_s)
    return max(wait_s, unit.oldest_s)


def _cost_s(place: Place, unit: UnitView) -> float:
    """What running it there takes, from its files."""
    if unit.name not in place.fits:
        return unit.start_s
    return unit.bring_s + (unit.swap_s - unit.bring_s if _counts_bring(unit) else unit.swap_s)


def _counts_bring(unit: UnitView) -> bool:
    return unit.tier is Residency.DISK and unit.exchangeable and unit.swap_s >= unit.bring_s
