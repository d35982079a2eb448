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
class Policy:
    """How a slot weighs things.

    min_stay_s: shortest time a unit keeps the slot while it has work, against
    thrash. max_wait_s: the bound on waiting for a swap that the slot aims at.
    aging_per_s: what a second of waiting counts, in queued tokens. host_bytes: room
    for weights in host memory, the running unit's included. crowding: how many times
    as many requests as still run another unit must have waiting to end a stay. preempt:
    where somebody would wait longer than the bound, running requests of which no byte has gone
    out are put back, instead of being waited for.
    """

    min_stay_s: float = 1.0
    max_wait_s: float = 30.0
    aging_per_s: float = 50.0
    host_bytes: int | None = None
    prefetch: bool = True
    crowding: float = 1.0
    preempt: bool = False


@dataclass(frozen=True, slots=True)
class UnitView:
    """One unit as the planner sees it. Times in s, sizes in bytes.

    oldest_s: how long its oldest waiting request has waited. demand_per_s: requests
    per second, as a moving average. bring_s: from disk to host. swap_s: from where it
    is now to running. exchangeable: the slot's present engine can run it; another one
    has to be started otherwise. wanted: an operator asked for it to be held.
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


def urgency(unit: UnitView, policy: Policy) -> float:
    """(Queued work + aging) / cost of the swap: how much a unit's turn it is."""
    return (unit.waiting_tokens + policy.aging_per_s * unit.oldest_s) / max(unit.swap_s, 1e-3)


def bounded(
    slot: SlotView, units: Sequence[UnitView], policy: Policy, start_s: float
) -> list[UnitView]:
    """The units as they are under the bound on host memory.

    One that can't be held beside the running and the pinned ones needs an engine to
    itself, which takes `start_s`.
    """
    if policy.host_bytes is None:
        return list(units)
    stay = {u.name: u.host_bytes for u in units if u.pinned or u.name == slot.running_unit}
    room = policy.host_bytes - sum(stay.values())
    return [
        u
        if u.tier is not Residency.DISK or u.host_bytes <= room + stay.get(u.name, 0)
        else replace(u, exchangeable=False, swap_s=start_s)
        for u in units
    ]


def next_step(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> Step:
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


def _late(slot: SlotView, able: Sequence[UnitView], policy: Policy) -> bool:
    """Whether somebody waits beyond the bound if all take their turns, eldest first, from now."""
    ahead_s = 0.0
    for unit in sorted(able, key=lambda u: (-u.oldest_s, u.name)):
        ahead_s += slot.drain_s + unit.swap_s
        if unit.oldest_s + ahead_s >= _AIM * policy.max_wait_s:
            return True
    return False


def next_fetch(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> str | None:
    """The unit to bring to host memory next, beside the running one.

    Who waits, then whom an operator wants there, then by demand.
    """
    wanted = to_keep(slot, units, policy)
    absent = [u for u in units if u.tier is Residency.DISK and u.exchangeable and u.name in wanted]
    waiting = [u for u in absent if u.waiting]
    if waiting:
        return min(waiting, key=lambda u: _turn(u, policy)).name
    asked_for = [u.name for u in absent if u.wanted]
    if asked_for:
        return min(asked_for)
    if not policy.prefetch or slot.waiting:
        return None
    hot = [u for u in absent if u.demand_per_s > 0 or u.pinned]
    return max(hot, key=lambda u: (u.pinned, u.demand_per_s, u.name)).name if hot else None


def _turn(unit: UnitView, policy: Policy) -> tuple[bool, float, str]:
    """Order of those who wait: first who may wait too long, by age; then by urgency."""
    late = unit.oldest_s + unit.swap_s >= policy.max_wait_s / 2
    return (not late, -(unit.oldest_s if late else urgency(unit, policy)), unit.name)


def to_keep(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> frozenset[str]:
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
            *_turn(u, policy),
        ),
    )
    kept: list[str] = []
    left = policy.host_bytes
    for unit in sure:
        if unit.name == slot.running_unit or unit.host_bytes <= left:
            kept.append(unit.name)
            left -= unit.host_bytes
    rest = [u for u in units if u.exchangeable and u.name not in kept]
    chosen = keep([_worth(u) for u in rest], [u.host_bytes for u in rest], max(0, left))
    return frozenset([*kept, *(rest[i].name for i in chosen)])


def _worth(unit: UnitView) -> float:
    """Demand × cost of bringing back."""
    held = unit.tier is not Residency.DISK
    return unit.demand_per_s * unit.bring_s * (_HELD_BONUS if held else 1.0)


def to_drop(
    slot: SlotView, units: Sequence[UnitView], policy: Policy, coming: str | None
) -> list[str]:
    """Units to forget so that what is held, and `coming`, stays within the bound.

    What belongs there least goes first; never the running unit, nor a pinned one.
    """
    if policy.host_bytes is None:
        return []
    held = [u for u in units if u.tier is not Residency.DISK and u.name != coming]
    arriving = sum(u.host_bytes for u in units if u.name == coming)
    excess = sum(u.host_bytes for u in held) + arriving - policy.host_bytes
    if excess <= 0:
        return []
    wanted = to_keep(slot, units, policy)
    order = sorted(
        (u for u in held if u.tier is Residency.HOST and not u.pinned),
        key=lambda u: (u.name in wanted, u.waiting > 0, _worth(u), u.name),
    )
    dropped = []
    for unit in order:
        if excess <= 0:
            break
        if unit.name != slot.running_unit:
            dropped.append(unit.name)
            excess -= unit.host_bytes
    return dropped
