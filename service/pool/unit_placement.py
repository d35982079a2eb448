"""The placement of units in a pool's slots. Pure.

Each unit has one slot at a time, where its requests wait and its weights may be held. A unit moves
when it would run sooner elsewhere: to an idle slot, or away from a slot with too much demand. Each
engine holds its own weights, so that a move costs a fetch and has to save more than this cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pool.swap_planner import SlotView, SwapPolicy, UnitView, urgency
from service.types import Residency

# A move must save this many times its cost, because both are estimates.
_MARGIN = 1.5
# Balancing must move this part of the busier slot's demand, so that units do not oscillate.
_LEAST_GAIN = 0.25


@dataclass(frozen=True, slots=True)
class Place:
    """One slot as placement sees it.

    Attributes:
        slot: The slot's state.
        units: The slot's units.
        fits: The units of the pool that the slot's engine can run.
        settled: Whether the engine runs and no unit is being loaded or removed.
    """

    slot: SlotView
    units: Sequence[UnitView]
    fits: frozenset[str]
    settled: bool


@dataclass(frozen=True, slots=True)
class Move:
    """A move of a unit from one slot to another. Both slots are indices."""

    unit: str
    source: int
    target: int


def next_move(places: Sequence[Place], policy: SwapPolicy) -> Move | None:
    """Choose the move that saves the most, if any is worth its cost."""
    return _move_to_idle(places, policy) or _balancing_move(places)


def _move_to_idle(places: Sequence[Place], policy: SwapPolicy) -> Move | None:
    """Move a unit with waiting requests to an idle slot where it would run sooner."""
    best: tuple[float, str, Move] | None = None
    idle = [i for i, place in enumerate(places) if place.settled and _is_idle(place)]
    if not idle:
        return None
    for s, place in enumerate(places):
        if not (place.slot.running or place.slot.waiting):
            continue  # an idle slot serves its units at once
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


def _balancing_move(places: Sequence[Place]) -> Move | None:
    """Move a unit away from the slot with the most demand."""
    loads = [sum(_load(unit) for unit in place.units) for place in places]
    heavy = max(range(len(places)), key=lambda i: (loads[i], i))
    best: tuple[float, str, Move] | None = None
    for unit in _movable(places[heavy]) if places[heavy].settled else ():
        # Its waiting requests would have to wait for a fetch.
        if unit.waiting:
            continue
        for t, place in enumerate(places):
            if t == heavy or not place.settled or unit.name not in place.fits:
                continue
            gain = loads[heavy] - max(loads[heavy] - _load(unit), loads[t] + _load(unit))
            found = (gain, unit.name, Move(unit.name, heavy, t))
            if gain > _LEAST_GAIN * loads[heavy] and (best is None or found[:2] > best[:2]):
                best = found
    return best[2] if best is not None else None


def _load(unit: UnitView) -> float:
    return unit.demand_per_s


def _is_idle(place: Place) -> bool:
    busy = place.slot.running or place.slot.waiting
    return not busy and not any(unit.waiting for unit in place.units)


def _movable(place: Place) -> list[UnitView]:
    # A unit that shares another one's weights stays with it.
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
    """Estimate the seconds until this unit gets its turn in its slot.

    The length of the running unit's stay is unknown. The estimate is therefore that a wait will
    last as long again as it has lasted so far. As in the ski-rental problem, the cost is then at
    most twice the least possible cost.
    """
    slot = place.slot
    rounds = 1 + slot.waiting / max(1, slot.running)
    wait_s = max(policy.min_stay_s - slot.stayed_s, slot.drain_s * rounds, 0.0) + unit.swap_s
    own = urgency(unit, policy)
    for other in place.units:
        first = other.waiting and other.name not in (unit.name, slot.running_unit)
        if first and urgency(other, policy) > own:
            wait_s += other.swap_s + max(policy.min_stay_s, slot.drain_s)
    return max(wait_s, unit.oldest_s)


def _cost_s(place: Place, unit: UnitView) -> float:
    """Estimate the seconds until a unit runs in another slot, loaded from its files."""
    if unit.name not in place.fits:
        return unit.start_s
    return unit.fill_s + (unit.swap_s - unit.fill_s if _counts_bring(unit) else unit.swap_s)


def _counts_bring(unit: UnitView) -> bool:
    return unit.tier is Residency.DISK and unit.swappable and unit.swap_s >= unit.fill_s
