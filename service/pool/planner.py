"""What a slot does next: whom to serve, whom to fetch, whom to forget. Pure, no clock of its own.

A slot serves the running unit's whole queue in one batch, and swaps when others have
more to run together than it has left; or sooner, when somebody would otherwise wait
longer than the bound. Words: a unit is an expert with full weights and any adapters
of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from service.pool.knapsack import keep
from service.types import Residency


@dataclass(frozen=True, slots=True)
class SwapPolicy:
    """How a slot weighs things.

    min_stay_s: shortest time a unit keeps the slot while it has work, against
    thrash. max_wait_s: the bound on waiting for a swap that the slot aims at.
    aging_per_s: what a second of waiting counts, in queued tokens. host_bytes: room
    for weights in host memory, the running unit's included. crowding: how many times
    as many requests as still run another unit must have waiting to end a stay. preempt:
    where somebody would wait longer than the bound, running requests of which no byte has gone
    out are put back, instead of being waited for. most_bytes: what host_bytes can become where
    slots share a bound (`pool.sharing`); None: nothing else.
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
    """One unit as the planner sees it. Times in s, sizes in bytes.

    oldest_s: how long its oldest waiting request has waited. demand_per_s: requests
    per second, as a moving average. bring_s: from disk to host. swap_s: from where it
    is now to running. exchangeable: the slot's present engine can run it; another one
    has to be started otherwise, which takes start_s. wanted: an operator asked for it to be held.
    needs: the unit whose weights it runs on; it weighs nothing then, can't be held without them,
    and they not be forgotten without it.
    """

    name: str
    tier: Residency
    waiting: int
    waiting_tokens: int
    oldest_s: float
    demand_per_s: float
    host_bytes: int
    bring_s: float
    swap_s: float
    pinned: bool
    exchangeable: bool = True
    wanted: bool = False
    needs: str = ""
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotView:
    """The slot: what runs, since when, how many requests, and how long ending them takes.

    closing: nobody is let in any more, so that another unit can come.
    """

    running_unit: str
    stayed_s: float
    running: int
    waiting: int
    drain_s: float
    closing: bool = False


class Next(StrEnum):
    """What to do about the running unit."""

    STAY = "stay"
    CLOSE = "close"
    SWAP = "swap"


@dataclass(frozen=True, slots=True)
class Step:
    """STAY: go on. CLOSE: let nobody else in, so that `unit` can come. SWAP: to `unit`, now."""

    act: Next
    unit: str = ""
    reason: str = ""


# Why a turn begins: somebody would wait too long.
LATE = "bound on waiting"
# A unit that is held is worth this much more than one that is not: fetching costs, too.
_HELD_BONUS = 1.5
# Turns are begun with the bound this far used up: how long a drain takes is a guess.
_AIM = 0.8


def urgency(unit: UnitView, policy: SwapPolicy) -> float:
    """(Queued work + aging) / cost of the swap: how much a unit's turn it is."""
    return (unit.waiting_tokens + policy.aging_per_s * unit.oldest_s) / max(unit.swap_s, 1e-3)


def bounded(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> list[UnitView]:
    """The units as they are under the bound on host memory.

    One that can't be held beside the running and the pinned ones needs an engine to itself.
    """
    bound = policy.most_bytes if policy.most_bytes is not None else policy.host_bytes
    if bound is None:
        return list(units)
    weights = {u.name: u.host_bytes for u in units}
    stay = {owner_of(u) for u in units if u.pinned or u.name == slot.running_unit}
    room = bound - sum(weights.get(owner, 0) for owner in stay)
    return [
        u
        if u.tier is not Residency.DISK
        or (0 if owner_of(u) in stay else weights.get(owner_of(u), 0)) <= room
        else replace(u, exchangeable=False, swap_s=u.start_s)
        for u in units
    ]


def owner_of(unit: UnitView) -> str:
    """The unit that has the weights that a unit runs on."""
    return unit.needs or unit.name


def next_step(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> Step:
    """Whether to go on with the running unit, and to whom to give the slot if not.

    Whose weights are still on their way does not end anybody's stay.
    """
    able = [
        u
        for u in units
        if u.waiting
        and u.name != slot.running_unit
        and (u.tier is Residency.HOST or not u.exchangeable)
    ]
    if not able:
        return Step(Next.STAY)
    eldest = max(able, key=lambda u: (u.oldest_s, u.name))
    urgent = max(able, key=lambda u: (urgency(u, policy), u.name))
    if _late(slot, able, policy):
        chosen, reason = eldest, LATE
    elif slot.closing:
        chosen, reason = urgent, "queue served"
    elif slot.waiting or slot.running > urgent.waiting * policy.crowding:
        return Step(Next.STAY)
    else:
        chosen, reason = urgent, "queue served"
    busy = (slot.waiting or slot.running) and not slot.closing
    # An expensive swap has to be worth it: an engine started is not left at once.
    if busy and slot.stayed_s < max(policy.min_stay_s, chosen.swap_s):
        return Step(Next.STAY)
    return Step(Next.CLOSE if slot.running else Next.SWAP, chosen.name, reason)


def _late(slot: SlotView, able: Sequence[UnitView], policy: SwapPolicy) -> bool:
    """Whether somebody waits beyond the bound if all take their turns, eldest first, from now."""
    ahead_s = 0.0
    for unit in sorted(able, key=lambda u: (-u.oldest_s, u.name)):
        ahead_s += slot.drain_s + unit.swap_s
        if unit.oldest_s + ahead_s >= _AIM * policy.max_wait_s:
            return True
    return False


def next_fetch(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> str | None:
    """The unit to bring to host memory next, beside the running one.

    Who waits, then whom an operator wants there, then by demand.
    """
    wanted = to_keep(slot, units, policy)
    tiers = {u.name: u.tier for u in units if u.exchangeable}
    absent = [
        u
        for u in units
        if u.tier is Residency.DISK
        and u.exchangeable
        and u.name in wanted
        and tiers.get(owner_of(u), Residency.LOADING) is not Residency.LOADING
    ]
    waiting = [u for u in absent if u.waiting]
    asked_for = [u for u in absent if u.wanted]
    hot = [u for u in absent if u.demand_per_s > 0 or u.pinned]
    if waiting:
        chosen = min(waiting, key=lambda u: turn(u, policy))
    elif asked_for:
        chosen = min(asked_for, key=lambda u: u.name)
    elif policy.prefetch and not slot.waiting and hot:
        chosen = max(hot, key=lambda u: (u.pinned, u.demand_per_s, u.name))
    else:
        return None
    # First the weights that it runs on.
    absent_too = chosen.needs and tiers[chosen.needs] is Residency.DISK
    return chosen.needs if absent_too else chosen.name


def turn(unit: UnitView, policy: SwapPolicy) -> tuple[bool, float, str]:
    """Order of those who wait: first who may wait too long, by age; then by urgency."""
    late = unit.oldest_s + unit.swap_s >= policy.max_wait_s / 2
    return (not late, -(unit.oldest_s if late else urgency(unit, policy)), unit.name)


def to_keep(slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy) -> frozenset[str]:
    """The units whose weights belong into host memory.

    The running, pinned, waited-for, and wanted ones, as far as they fit; of the others
    the best knapsack of demand × cost of bringing back.
    """
    if policy.host_bytes is None:
        return frozenset(u.name for u in units)
    sure = sorted(
        (
            u
            for u in units
            if u.name == slot.running_unit
            or (u.exchangeable and (u.pinned or u.waiting or u.wanted))
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
    rest = [u for u in units if u.exchangeable and not u.needs and u.name not in kept]
    worth = worths(units)
    chosen = keep([worth[u.name] for u in rest], [u.host_bytes for u in rest], max(0, left))
    kept.update(rest[i].name for i in chosen)
    # Who runs on what is kept adds nothing to it.
    return frozenset(
        u.name
        for u in units
        if owner_of(u) in kept and (u.exchangeable or u.name == slot.running_unit)
    )


def worths(units: Sequence[UnitView]) -> dict[str, float]:
    """Demand × cost of bringing back, of each unit's weights, by whoever runs on them."""
    demand = {u.name: 0.0 for u in units}
    for unit in units:
        demand[owner_of(unit)] = demand.get(owner_of(unit), 0.0) + unit.demand_per_s
    return {
        u.name: demand[u.name] * u.bring_s * (_HELD_BONUS if u.tier is not Residency.DISK else 1.0)
        for u in units
    }


def to_drop(
    slot: SlotView, units: Sequence[UnitView], policy: SwapPolicy, coming: str | None
) -> list[str]:
    """Units to forget so that what is held, and `coming`, stays within the bound.

    What belongs there least goes first; never the running unit, nor a pinned one that fits beside
    it, nor the weights that these or `coming` run on. With weights go the units that run on them.
    """
    if policy.host_bytes is None:
        return []
    held = [u for u in units if u.tier is not Residency.DISK and u.name != coming]
    excess = _held_with(units, coming) - policy.host_bytes
    if excess <= 0:
        return []
    wanted = to_keep(slot, units, policy)
    worth = worths(units)
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
    """Whether `coming` is within the bound on host memory once others have been dropped."""
    gone = sum(u.host_bytes for u in units if u.name in dropped)
    return policy.host_bytes is None or _held_with(units, coming) - gone <= policy.host_bytes
