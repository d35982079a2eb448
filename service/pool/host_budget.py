"""How a pool's bound on host memory is divided over the slots that units share. Pure.

The bound is the pool's. Every slot gets room for the largest of its units alone, so that
any of them can run; the rest goes, over all slots, to pinned units, to those that
somebody waits for (who may wait too long first, by age), to those that an operator wants, and then
to the best knapsack of demand × cost of bringing back. Room that nobody needs is shared
out evenly. A slot gets more only once others have forgotten as much: what slots may hold,
and what they still do, never comes to more than the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.pool.knapsack import keep
from service.pool.placement import Place
from service.pool.planner import SwapPolicy, UnitView, owner_of, turn, worths
from service.types import Residency


@dataclass(frozen=True, slots=True)
class HostMemoryClaim:
    """What a slot should have, and the most it could if its need came first. In bytes."""

    needs: int
    most: int


def claims(bound: int, places: Sequence[Place], policy: SwapPolicy) -> list[HostMemoryClaim]:
    """Each slot's part of a pool's bound.

    Their sum is within the bound; only where it can't hold even the largest unit of each slot
    alone, everybody gets that: what runs is never refused.
    """
    weights = [{u.name: u.host_bytes for u in place.units} for place in places]
    floors = [max(sizes.values(), default=0) for sizes in weights]
    if sum(floors) >= bound:
        return [HostMemoryClaim(floor, floor) for floor in floors]
    every = [(i, unit) for i, place in enumerate(places) for unit in place.units]
    running = [(i, unit) for i, unit in every if unit.name == places[i].slot.running_unit]
    able = [(i, unit) for i, unit in every if unit.exchangeable]
    pinned = sorted(
        ((i, unit) for i, unit in able if unit.pinned),
        key=lambda one: (one[1].tier is Residency.DISK, one[1].name),
    )
    # What somebody is being fetched into now is free again one day: it is no reason to start
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
    for i, unit in sorted(waiting, key=lambda one: _turn(one[1], policy)):
        taking.take(i, unit)
    for i, unit in able:
        if unit.wanted:
            taking.take(i, unit)
    worth = [worths(place.units) for place in places]
    rest = [(i, u) for i, u in able if not u.needs and u.name not in taking.kept[i]]
    chosen = keep(
        [worth[i][unit.name] for i, unit in rest],
        [unit.host_bytes for _, unit in rest],
        taking.left,
    )
    for k in sorted(chosen):
        taking.take(*rest[k])
    return [HostMemoryClaim(*pair) for pair in zip(taking.needs, most, strict=True)]


def _turn(unit: UnitView, policy: SwapPolicy) -> tuple[bool, bool, float, str]:
    """Who may wait too long first, by age: so everybody is first one day. Then who is held."""
    not_late, order, name = turn(unit, policy)
    return (not_late, not_late and unit.tier is Residency.DISK, order, name)


def least(places: Sequence[Place], pinned: str = "") -> int:
    """Bytes that slots hold at least, whatever runs: pinned units, and the largest others.

    `pinned`: a unit that is to be pinned, beside those that are.
    """
    owners = {owner_of(u) for place in places for u in place.units if u.pinned or u.name == pinned}
    sizes = {u.name: u.host_bytes for place in places for u in place.units if not u.needs}
    kept = sum(size for name, size in sizes.items() if name in owners)
    loose = sorted((size for name, size in sizes.items() if name not in owners), reverse=True)
    return kept + sum(loose[: len(places)])


class _Taking:
    """Units taken one by one, as far as there is room left beyond each slot's own."""

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
    """What each slot may hold from now on. `given`: until now; `held`: what it does hold.

    Taken at once from those that have more than they need, as far as others need it; given
    as far as it is free. Where the bound can't hold what all need, which is then the largest unit
    of each alone, that much is divided: not more, and by the same rules.
    """
    needs = [claim.needs for claim in claimed]
    bound = max(bound, sum(needs))
    rooms = list(given)
    short = sum(map(max, given, needs)) - bound
    for i in sorted(range(len(rooms)), key=lambda k: (needs[k] - given[k], k)):
        cut = min(max(0, short), max(0, given[i] - needs[i]))
        rooms[i] -= cut
        short -= cut
    # What a slot needs and holds already takes nothing from the others.
    rooms = [max(room, min(pair)) for room, *pair in zip(rooms, needs, held, strict=True)]
    free = max(0, bound - sum(map(max, rooms, held)))
    for i, need in enumerate(needs):
        more = min(free, max(0, need - rooms[i]))
        rooms[i] += more
        free -= more
    # What nobody needs yet is at hand where somebody does.
    return [room + free // len(rooms) for room in rooms]
