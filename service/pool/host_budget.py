"""The division of a pool's bound on host memory over the slots that units share. Pure.

Each slot gets room for the largest of its units alone, so that any of them can run. The rest goes,
over all slots, to pinned units, to units with waiting requests (late ones first, by age), to those
that an operator wants, and then to the best knapsack of demand × cost of loading them again. Room
that no unit needs is divided evenly. A slot gets more only once others have evicted as much. The
room of the slots, and what they still hold beyond it, is never more than the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pool.knapsack import keep
from service.pool.placement import Place
from service.pool.planner import SwapPolicy, UnitView, owner_of, retention_values, turn
from service.types import Residency


@dataclass(frozen=True, slots=True)
class HostMemoryClaim:
    """The bytes that a slot should have, and the most that it could if its need came first."""

    needs: int
    most: int


def claims(bound: int, places: Sequence[Place], policy: SwapPolicy) -> list[HostMemoryClaim]:
    """Compute each slot's part of a pool's bound.

    Their sum is within the bound. Only where that can't hold even the largest unit of each slot
    alone, each slot gets as much as that, as a unit that runs is never refused.

    Args:
        bound: The pool's bound.
        places: The shared slots.
        policy: How they weigh their units.
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
        key=lambda one: (one[1].tier is Residency.DISK, one[1].name),
    )
    # Room that a unit is being loaded to now is free again later: it is no reason to start
    # another engine.
    lasting = _Taking(weights, floors, bound - sum(floors))
    for i, unit in (*running, *pinned):
        lasting.take(i, unit)
    most = [needs + lasting.left for needs in lasting.needs]
    taking = _Taking(weights, floors, bound - sum(floors))
    coming = [(i, unit) for i, unit in every if unit.tier is Residency.LOADING]
    for i, unit in (*running, *coming, *pinned):
        taking.take(i, unit)
    waiting = [(i, unit) for i, unit in able if unit.waiting]
    for i, unit in sorted(waiting, key=lambda one: _waiting_order(one[1], policy)):
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


def _waiting_order(unit: UnitView, policy: SwapPolicy) -> tuple[bool, bool, float, str]:
    """The sort key of waiting units: late ones by age, so that each is first one day; then held."""
    not_late, order, name = turn(unit, policy)
    return (not_late, not_late and unit.tier is Residency.DISK, order, name)


def least(places: Sequence[Place], pinned: str = "") -> int:
    """Compute the bytes that slots hold at least: the pinned units, and the largest others.

    Args:
        places: The shared slots.
        pinned: A unit that is to be pinned, beside those that are.
    """
    owners = {owner_of(u) for place in places for u in place.units if u.pinned or u.name == pinned}
    sizes = {u.name: u.host_bytes for place in places for u in place.units if not u.needs}
    kept = sum(size for name, size in sizes.items() if name in owners)
    loose = sorted((size for name, size in sizes.items() if name not in owners), reverse=True)
    return kept + sum(loose[: len(places)])


class _Taking:
    """Units that are taken one by one, as far as there is room beyond each slot's floor."""

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

    Room is taken at once from slots that have more than they need, as far as others need it. It is
    given as far as it is free. Where the bound can't hold the largest unit of each slot, the sum of
    these is divided by the same rules.

    Args:
        bound: The pool's bound.
        claimed: The slots' claims.
        given: The bytes that they may hold until now.
        held: The bytes that they do hold.
    """
    needs = [claim.needs for claim in claimed]
    bound = max(bound, sum(needs))
    rooms = list(given)
    short = sum(map(max, given, needs)) - bound
    for i in sorted(range(len(rooms)), key=lambda k: (needs[k] - given[k], k)):
        cut = min(max(0, short), max(0, given[i] - needs[i]))
        rooms[i] -= cut
        short -= cut
    # Weights that a slot needs and holds already take nothing from the others.
    rooms = [max(room, min(pair)) for room, *pair in zip(rooms, needs, held, strict=True)]
    free = max(0, bound - sum(map(max, rooms, held)))
    for i, need in enumerate(needs):
        more = min(free, max(0, need - rooms[i]))
        rooms[i] += more
        free -= more
    # Room that no slot needs yet is there for the one that needs it first.
    return [room + free // len(rooms) for room in rooms]
