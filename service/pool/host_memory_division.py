"""The division of a pool's bound on host memory over the slots that units share. Pure.

Each slot first gets room for its largest unit alone, so that any of its units can run. The rest is
given to units over all slots, in this order: pinned units, units with waiting requests (late units
first, by age), and units that an operator wants. The best knapsack of demand × cost of reloading
decides among the other units. Room that no unit needs is divided evenly. A slot gets more room only
after other slots have evicted as much. The room of all slots plus the bytes that slots still hold
beyond their room never exceeds the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pool.knapsack_solver import keep
from service.pool.swap_planner import SwapPolicy, UnitView, owner_of, retention_values, turn
from service.pool.unit_placement import Place
from service.types import Residency


@dataclass(frozen=True, slots=True)
class HostMemoryClaim:
    """The bytes that a slot should have, and the most that it could get if it came first."""

    needs: int
    most: int


def claims(bound: int, places: Sequence[Place], policy: SwapPolicy) -> list[HostMemoryClaim]:
    """Compute each slot's part of a pool's bound.

    The sum of the parts is within the bound. The one exception is a bound that can't hold the
    largest unit of every slot: each slot still gets room for its largest unit, because a running
    unit is never refused.

    Args:
        bound: The pool's bound in bytes.
        places: The shared slots.
        policy: The policy by which the slots weigh their units.
    """
    weights = [{u.name: u.host_bytes for u in place.units} for place in places]
    floors = [max(sizes.values(), default=0) for sizes in weights]
    if sum(floors) >= bound:
        return [HostMemoryClaim(floor, floor) for floor in floors]
    every = [(i, unit) for i, place in enumerate(places) for unit in place.units]
    running = [(i, unit) for i, unit in every if unit.name == places[i].slot.running_unit]
    able = [(i, unit) for i, unit in every if unit.swappable]
    pinned = sorted(
        ((i, unit) for i, unit in able if unit.pinned),
        key=lambda pair: (pair[1].tier is Residency.DISK, pair[1].name),
    )
    # A load in progress takes room for a while only. This is no reason to start another engine.
    lasting = _Taking(weights, floors, bound - sum(floors))
    for i, unit in (*running, *pinned):
        lasting.take(i, unit)
    most = [needs + lasting.left for needs in lasting.needs]
    taking = _Taking(weights, floors, bound - sum(floors))
    coming = [(i, unit) for i, unit in every if unit.tier is Residency.LOADING]
    for i, unit in (*running, *coming, *pinned):
        taking.take(i, unit)
    waiting = [(i, unit) for i, unit in able if unit.waiting]
    for i, unit in sorted(waiting, key=lambda pair: _waiting_order(pair[1], policy)):
        taking.take(i, unit)
    for i, unit in able:
        if unit.wanted:
            taking.take(i, unit)
    worth = [retention_values(place.units) for place in places]
    rest = [(i, u) for i, u in able if not u.needs and u.name not in taking.kept[i]]
    chosen = keep(
        [worth[i][unit.name] for i, unit in rest],
        [unit.host_bytes for _, unit in rest],
        taking.left,
    )
    for k in sorted(chosen):
        taking.take(*rest[k])
    return [HostMemoryClaim(*pair) for pair in zip(taking.needs, most, strict=True)]


def _waiting_order(unit: UnitView, policy: SwapPolicy) -> tuple[bool, bool, bool, float, str]:
    """The sort key of waiting units: late units by age, then held units, then by urgency."""
    patient, not_late, order, name = turn(unit, policy)
    return (patient, not_late, not_late and unit.tier is Residency.DISK, order, name)


def least(places: Sequence[Place], pinned: str = "") -> int:
    """Compute the least bytes that the slots need: pinned units and the largest other units.

    Args:
        places: The shared slots.
        pinned: A further unit to count as pinned.
    """
    owners = {owner_of(u) for place in places for u in place.units if u.pinned or u.name == pinned}
    sizes = {u.name: u.host_bytes for place in places for u in place.units if not u.needs}
    kept = sum(size for name, size in sizes.items() if name in owners)
    loose = sorted((size for name, size in sizes.items() if name not in owners), reverse=True)
    return kept + sum(loose[: len(places)])


class _Taking:
    """A greedy selection of units that fit in the room beyond each slot's floor."""

    def __init__(self, weights: Sequence[dict[str, int]], floors: Sequence[int], left: int) -> None:
        self.needs = list(floors)
        self.left = left
        self.kept: list[set[str]] = [set() for _ in floors]
        self._weights = weights
        self._used = [0] * len(floors)

    def take(self, slot: int, unit: UnitView) -> None:
        owner = owner_of(unit)
        used = self._used[slot] + self._weights[slot].get(owner, 0)
        more = max(0, used - self.needs[slot])
        if owner in self.kept[slot] or more > self.left:
            return
        self.kept[slot].add(owner)
        self._used[slot] = used
        self.needs[slot] += more
        self.left -= more


def divide(
    bound: int, claimed: Sequence[HostMemoryClaim], given: Sequence[int], held: Sequence[int]
) -> list[int]:
    """Compute the bytes that each slot may hold from now on.

    A slot with more room than it needs loses the surplus at once if other slots need it. A slot
    gets more room only as far as room is free. Where the bound can't hold the largest unit of each
    slot, the sum of these units is divided by the same rules.

    Args:
        bound: The pool's bound in bytes.
        claimed: The slots' claims.
        given: The bytes that each slot was allowed to hold until now.
        held: The bytes that each slot holds now.

    Returns:
        The bytes that each slot may hold, in the order of the claims.
    """
    needs = [claim.needs for claim in claimed]
    bound = max(bound, sum(needs))
    rooms = list(given)
    short = sum(map(max, given, needs)) - bound
    for i in sorted(range(len(rooms)), key=lambda k: (needs[k] - given[k], k)):
        cut = min(max(0, short), max(0, given[i] - needs[i]))
        rooms[i] -= cut
        short -= cut
    # Weights that a slot needs and already holds take nothing from other slots.
    rooms = [max(room, min(pair)) for room, *pair in zip(rooms, needs, held, strict=True)]
    free = max(0, bound - sum(map(max, rooms, held)))
    for i, need in enumerate(needs):
        more = min(free, max(0, need - rooms[i]))
        rooms[i] += more
        free -= more
    # The rest stays undivided, for the first slot that needs it.
    return [room + free // len(rooms) for room in rooms]
