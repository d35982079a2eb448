"""The next step of a slot: the unit to serve, to load and to evict. Pure, without a clock.

A slot serves the running unit's whole queue in one batch. It swaps when another unit has more work
than the running unit has left. It swaps sooner when a request would otherwise wait longer than the
bound. A unit is an expert with weights and its adapters.

Lines of batches count only where nobody else wants the slot. They cause no swap while people ask
for the running unit, and they do not keep the slot from a unit that people wait for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.pool.knapsack_solver import keep
from service.types import Residency


@dataclass(frozen=True, slots=True)
class SwapPolicy:
    """The settings by which a slot weighs its units.

    Attributes:
        min_stay_s: The shortest time that a unit with work keeps the slot. It prevents thrashing.
        max_wait_s: The slot aims to keep waits for a swap below this time.
        aging_per_s: One second of waiting counts as this many queued tokens.
        host_bytes: Room for weights in host memory, including the running unit's weights. None
            means that there is no bound.
        prefetch: Whether units with demand are loaded before requests wait for them.
        crowding: A stay ends when the requests that wait for another unit exceed the running
            requests by this factor.
        preempt: Whether a slot puts running requests without a sent byte back into the queue, where
            another request would otherwise wait longer than the bound.
        most_bytes: The largest value that host_bytes can reach where slots share a bound
            (`host_budget`). None means that host_bytes does not change.
    """

    min_stay_s: float = 1.0
    max_wait_s: float = 30.0
    aging_per_s: float = 50.0
    host_bytes: int | None = None
    prefetch: bool = True
    crowding: float = 1.0
    preempt: bool = False
    most_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class UnitView:
    """One unit as the planner sees it.

    Attributes:
        name: The unit's name.
        tier: Where the weights are.
        waiting: The number of requests that wait for the unit.
        waiting_tokens: The number of tokens in the prompts of these requests.
        oldest_s: Seconds that the oldest of these requests has waited.
        demand_per_s: Requests per second, as a moving average.
        host_bytes: Bytes of the weights; 0 where the unit shares another unit's weights.
        fill_s: Seconds to load the weights from disk to host memory.
        swap_s: Seconds from the present tier until the unit runs.
        pinned: Whether the unit stays in host memory.
        swappable: Whether the slot's present engine can run the unit.
        wanted: Whether an operator asked to load the unit.
        needs: The unit whose weights this unit shares, or None. The two are loaded and evicted
            together.
        start_s: Seconds to replace the present engine by another engine that runs the unit.
        batch_waiting: The number of lines of batches among the waiting requests.
    """

    name: str
    tier: Residency
    waiting: int
    waiting_tokens: int
    oldest_s: float
    demand_per_s: float
    host_bytes: int
    fill_s: float
    swap_s: float
    pinned: bool
    swappable: bool = True
    wanted: bool = False
    needs: str | None = None
    start_s: float = 0.0
    batch_waiting: int = 0

    @property
    def patient(self) -> bool:
        """Whether only lines of batches wait for the unit."""
        return self.waiting == self.batch_waiting


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot as the planner sees it.

    Attributes:
        running_unit: The unit that runs.
        stayed_s: Seconds since that unit began to run.
        running: The number of its running requests.
        waiting: The number of its waiting requests.
        drain_s: Seconds that running requests need to end.
        closing: Whether the gate is closed, so that another unit can be swapped in.
        batch_running: The number of lines of batches among the running requests.
        batch_waiting: The number of lines of batches among the waiting requests.
        people_ago_s: Seconds since the last other request for the running unit.
    """

    running_unit: str
    stayed_s: float
    running: int
    waiting: int
    drain_s: float
    closing: bool = False
    batch_running: int = 0
    batch_waiting: int = 0
    people_ago_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Stay:
    """The running unit stays."""


@dataclass(frozen=True, slots=True)
class CloseGate:
    """The gate closes, so that `unit` can be swapped in later, for this reason."""

    unit: str
    reason: str


@dataclass(frozen=True, slots=True)
class SwapIn:
    """The weights of `unit` are swapped in now, for this reason."""

    unit: str
    reason: str


Step = Stay | CloseGate | SwapIn
"""The next step of a slot."""


# This is the reason of a swap without which a request would wait too long.
LATE = "bound on waiting"
# A held unit is worth this many times as much as another, because a fetch costs time, too.
_HELD_BONUS = 1.5
# A swap begins when this part of the bound is used up, because a drain's length is a guess.
_AIM = 0.8


def urgency(unit: UnitView, policy: SwapPolicy) -> float:
    """Compute a unit's claim to the next turn: (queued work + aging) / cost of the swap."""
    return (unit.waiting_tokens + policy.aging_per_s * unit.oldest_s) / max(unit.swap_s, 1e-3)


def bounded(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> list[UnitView]:
    """Apply the bound on host memory to the units.

    A unit that does not fit beside the running unit and the pinned units needs its own engine.
    """
    bound = policy.most_bytes if policy.most_bytes is not None else policy.host_bytes
    if bound is None:
        return list(units)
    weights = {u.name: u.host_bytes for u in units}
    stay = {owner_of(u) for u in units if u.pinned or u.name == slot.running_unit}
    room = bound - sum(weights.get(owner, 0) for owner in stay)
    if max(weights.values(), default=0) <= room:
        return list(units)
    return [
        u
        if u.tier is not Residency.DISK
        or (0 if owner_of(u) in stay else weights.get(owner_of(u), 0)) <= room
        else replace(u, swappable=False, swap_s=u.start_s)
        for u in units
    ]


def owner_of(unit: UnitView) -> str:
    """Return the name of the unit whose weights a unit runs on."""
    return unit.needs or unit.name


def next_step(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> Step:
    """Decide whether the running unit stays, and otherwise which unit gets the slot.

    A unit whose weights are still loading does not end the running unit's stay.
    """
    able = [
        u
        for u in units
        if u.waiting
        and u.name != slot.running_unit
        and (u.tier is Residency.HOST or not u.swappable)
    ]
    able = _for_people(slot, able, policy)
    if not able:
        return Stay()
    if not able[0].patient:
        # Lines of batches give way: only what people have in the slot counts.
        waiting = slot.waiting - slot.batch_waiting
        working = slot.running - slot.batch_running
    else:
        waiting, working = slot.waiting, slot.running
    eldest = max(able, key=lambda u: (u.oldest_s, u.name))
    urgent = max(able, key=lambda u: (urgency(u, policy), u.name))
    if not eldest.patient and _late(slot, able, policy):
        chosen, reason = eldest, LATE
    elif slot.closing:
        chosen, reason = urgent, "queue served"
    elif waiting or working > urgent.waiting * policy.crowding:
        return Stay()
    else:
        chosen, reason = urgent, "queue served"
    busy = (waiting or working) and not slot.closing
    # An expensive swap has to pay off, so a new engine is kept for a while.
    if busy and slot.stayed_s < max(policy.min_stay_s, chosen.swap_s):
        return Stay()
    step = CloseGate if slot.running else SwapIn
    return step(chosen.name, reason)


def _for_people(slot: SlotView, able: Sequence[UnitView], policy: SwapPolicy) -> list[UnitView]:
    """Return the units that may get the slot: those that people wait for, where there are any.

    A unit for batches waits until people have not asked for the running unit for as long as two
    swaps take. A swap that they would have to wait for is then no dearer than the pause was.
    """
    asked = [u for u in able if not u.patient]
    if asked:
        return asked
    if slot.waiting > slot.batch_waiting or slot.running > slot.batch_running:
        return []
    return [u for u in able if slot.people_ago_s >= max(policy.min_stay_s, 2 * u.swap_s)]


def _late(slot: SlotView, able: Sequence[UnitView], policy: SwapPolicy) -> bool:
    """Return whether a request would wait beyond the bound if units took turns, oldest first."""
    ahead_s = 0.0
    for unit in sorted(able, key=lambda u: (-u.oldest_s, u.name)):
        ahead_s += slot.drain_s + unit.swap_s
        if unit.oldest_s + ahead_s >= _AIM * policy.max_wait_s:
            return True
    return False


def next_fetch(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> str | None:
    """Choose the unit to load to host memory next, beside the running unit.

    Units with waiting requests come first. Units that an operator wants follow, and then the other
    units in order of demand, unless requests wait for a unit that has no room yet: what was loaded
    without a request would take the room that other slots make for it.
    """
    wanted = units_to_keep(slot, units, policy)
    tiers = {u.name: u.tier for u in units if u.swappable}
    absent = [
        u
        for u in units
        if u.tier is Residency.DISK
        and u.swappable
        and u.name in wanted
        and tiers.get(owner_of(u), Residency.LOADING) is not Residency.LOADING
    ]
    waiting = [u for u in absent if u.waiting]
    cramped = any(u.waiting and u.tier is Residency.DISK and u.swappable for u in units)
    asked_for = [u for u in absent if u.wanted]
    hot = [u for u in absent if u.demand_per_s > 0 or u.pinned]
    if waiting:
        chosen = min(waiting, key=lambda u: turn(u, policy))
    elif asked_for:
        chosen = min(asked_for, key=lambda u: u.name)
    elif policy.prefetch and not slot.waiting and hot and not cramped:
        chosen = max(hot, key=lambda u: (u.pinned, u.demand_per_s, u.name))
    else:
        return None
    # A unit without weights needs its owner's weights first.
    absent_too = chosen.needs and tiers[chosen.needs] is Residency.DISK
    return chosen.needs if absent_too else chosen.name


def turn(unit: UnitView, policy: SwapPolicy) -> tuple[bool, bool, float, str]:
    """Return the sort key of units with waiting requests: late units by age, then by urgency.

    Units for batches alone come last.
    """
    late = unit.oldest_s + unit.swap_s >= policy.max_wait_s / 2
    return (
        unit.waiting > 0 and unit.patient,
        not late,
        -(unit.oldest_s if late else urgency(unit, policy)),
        unit.name,
    )


def units_to_keep(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> frozenset[str]:
    """Choose the units whose weights belong in host memory.

    The running, pinned, waited-for and wanted units come first, as far as they fit. The best
    knapsack of demand × cost of reloading decides among the other units.
    """
    if policy.host_bytes is None:
        return frozenset(u.name for u in units)
    sure = sorted(
        (
            u
            for u in units
            if u.name == slot.running_unit or (u.swappable and (u.pinned or u.waiting or u.wanted))
        ),
        key=lambda u: (
            u.name != slot.running_unit,
            not u.pinned,
            not u.waiting,
            *turn(u, policy),
        ),
    )
    weights = {u.name: u.host_bytes for u in units}
    kept: set[str] = set()
    left = policy.host_bytes
    for unit in sure:
        size = 0 if owner_of(unit) in kept else weights.get(owner_of(unit), 0)
        if unit.name == slot.running_unit or size <= left:
            kept.add(owner_of(unit))
            left -= size
    rest = [u for u in units if u.swappable and not u.needs and u.name not in kept]
    worth = retention_values(units)
    chosen = keep([worth[u.name] for u in rest], [u.host_bytes for u in rest], max(0, left))
    kept.update(rest[i].name for i in chosen)
    # Units that share kept weights need no further room.
    return frozenset(
        u.name
        for u in units
        if owner_of(u) in kept and (u.swappable or u.name == slot.running_unit)
    )


def retention_values(units: Sequence[UnitView]) -> dict[str, float]:
    """Compute the demand for each unit's weights × the cost of loading them.

    All units that run on the weights count in the demand.
    """
    demand = {u.name: 0.0 for u in units}
    for unit in units:
        demand[owner_of(unit)] = demand.get(owner_of(unit), 0.0) + unit.demand_per_s
    return {
        u.name: demand[u.name] * u.fill_s * (_HELD_BONUS if u.tier is not Residency.DISK else 1.0)
        for u in units
    }


def units_to_evict(
    slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy, coming: str | None
) -> list[str]:
    """Choose the units to evict so that the held units and `coming` fit in the bound.

    The unit with the least value goes first, together with the units that run on its weights. The
    running unit always stays, and so do pinned units that fit beside it and the weights that these
    units or `coming` run on.
    """
    if policy.host_bytes is None:
        return []
    held = [u for u in units if u.tier is not Residency.DISK and u.name != coming]
    excess = _held_with(units, coming) - policy.host_bytes
    if excess <= 0:
        return []
    wanted = units_to_keep(slot, units, policy)
    worth = retention_values(units)
    stay = {
        owner_of(u)
        for u in units
        if u.name in (slot.running_unit, coming)
        or u.tier is Residency.LOADING
        or (u.pinned and u.tier is not Residency.DISK and u.name in wanted)
    }
    wait = {owner_of(u) for u in units if u.waiting}
    order = sorted(
        (u for u in held if u.tier is Residency.HOST and not u.needs and u.name not in stay),
        key=lambda u: (u.name in wanted, u.name in wait, worth[u.name], u.name),
    )
    dropped = []
    for unit in order:
        if excess <= 0:
            break
        dropped += [u.name for u in held if u.needs == unit.name]
        dropped.append(unit.name)
        excess -= unit.host_bytes
    return dropped


def _held_with(units: Sequence[UnitView], coming: str | None) -> int:
    return sum(u.host_bytes for u in units if u.tier is not Residency.DISK or u.name == coming)


def has_room(
    units: Sequence[UnitView], policy: SwapPolicy, coming: str, dropped: Sequence[str]
) -> bool:
    """Return whether `coming` fits in the bound on host memory after `dropped` were evicted."""
    gone = sum(u.host_bytes for u in units if u.name in dropped)
    return policy.host_bytes is None or _held_with(units, coming) - gone <= policy.host_bytes
