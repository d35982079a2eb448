"""What a slot does next: whom to serve, whom to fetch, whom to forget. Pure, no clock of its own.

A slot serves the running unit's whole queue in one batch, and swaps when nobody
waits for it any more; or sooner, when somebody else would otherwise wait longer
than the bound. Words: a unit is an expert with full weights and any adapters of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.pool.knapsack import keep
from service.types import Residency


@dataclass(frozen=True, slots=True)
class Policy:
    """How a slot weighs things.

    min_stay_s: shortest time a unit keeps the slot while it has work, against
    thrash. max_wait_s: the bound on waiting for a swap that the slot aims at.
    aging_per_s: what a second of waiting counts, in queued tokens. host_bytes: room
    for weights in host memory, the running unit's included.
    """

    min_stay_s: float = 1.0
    max_wait_s: float = 30.0
    aging_per_s: float = 50.0
    host_bytes: int | None = None
    prefetch: bool = True


@dataclass(frozen=True, slots=True)
class UnitView:
    """One unit as the planner sees it. Times in s, sizes in bytes.

    oldest_s: how long its oldest waiting request has waited. demand_per_s: requests
    per second, as a moving average. bring_s: from disk to host. swap_s: from where it
    is now to running. exchangeable: the slot's present engine can run it; another one
    has to be started otherwise.
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


@dataclass(frozen=True, slots=True)
class SlotView:
    """The slot: what runs, since when, how many requests, and how long ending them takes."""

    running_unit: str
    stayed_s: float
    running: int
    waiting: int
    drain_s: float


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


def urgency(unit: UnitView, policy: Policy) -> float:
    """(Queued work + aging) / cost of the swap: how much a unit's turn it is."""
    return (unit.waiting_tokens + policy.aging_per_s * unit.oldest_s) / max(unit.swap_s, 1e-3)


def next_step(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> Step:
    """Whether to go on with the running unit, and to whom to give the slot if not."""
    wanting = [u for u in units if u.waiting and u.name != slot.running_unit]
    if not wanting:
        return Step(Next.STAY)
    overdue = [u for u in wanting if u.oldest_s + slot.drain_s + u.swap_s >= policy.max_wait_s]
    if overdue:
        chosen, reason = max(overdue, key=lambda u: (u.oldest_s, u.name)), "bound on waiting"
    elif slot.waiting or (slot.running and slot.stayed_s < policy.min_stay_s):
        return Step(Next.STAY)
    else:
        chosen, reason = max(wanting, key=lambda u: (urgency(u, policy), u.name)), "queue served"
    if chosen.exchangeable and chosen.tier is not Residency.HOST:
        # Its weights are still on their way: the running unit may go on until they are here.
        return Step(Next.STAY, chosen.name, reason)
    return Step(Next.CLOSE if slot.running else Next.SWAP, chosen.name, reason)


def next_fetch(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> str | None:
    """The unit to bring to host memory next, beside the running one: who waits, then by demand."""
    absent = [u for u in units if u.tier is Residency.DISK and u.exchangeable]
    waiting = [u for u in absent if u.waiting]
    if waiting:
        return max(waiting, key=lambda u: (urgency(u, policy), u.name)).name
    if not policy.prefetch or slot.waiting:
        return None
    wanted = to_keep(slot, units, policy)
    hot = [u for u in absent if u.name in wanted and (u.demand_per_s > 0 or u.pinned)]
    return max(hot, key=lambda u: (u.pinned, u.demand_per_s, u.name)).name if hot else None


def to_keep(slot: SlotView, units: Sequence[UnitView], policy: Policy) -> frozenset[str]:
    """The units whose weights belong into host memory.

    The running, pinned, and waited-for ones, as far as they fit; of the others the
    best knapsack of demand × cost of bringing back.
    """
    if policy.host_bytes is None:
        return frozenset(u.name for u in units)
    sure = sorted(
        (u for u in units if u.name == slot.running_unit or u.pinned or u.waiting),
        key=lambda u: (u.name != slot.running_unit, not u.pinned, -urgency(u, policy), u.name),
    )
    kept: list[str] = []
    left = policy.host_bytes
    for unit in sure:
        if unit.name == slot.running_unit or unit.host_bytes <= left:
            kept.append(unit.name)
            left -= unit.host_bytes
    rest = [u for u in units if u.name not in kept]
    values = [u.demand_per_s * u.bring_s for u in rest]
    chosen = keep(values, [u.host_bytes for u in rest], max(0, left))
    return frozenset([*kept, *(rest[i].name for i in chosen)])


def to_drop(
    slot: SlotView, units: Sequence[UnitView], policy: Policy, coming: str | None
) -> list[str]:
    """Units to forget so that what is held, and `coming`, stays within the bound.

    What belongs there least goes first; never the running unit, nor a pinned one.
    """
    if policy.host_bytes is None:
        return []
    held = [u for u in units if u.tier in (Residency.HOST, Residency.DEVICE)]
    arriving = sum(u.host_bytes for u in units if u.name == coming)
    excess = sum(u.host_bytes for u in held) + arriving - policy.host_bytes
    wanted = to_keep(slot, units, policy)
    order = sorted(
        (u for u in held if u.name != slot.running_unit and not u.pinned),
        key=lambda u: (u.name in wanted, u.waiting > 0, u.demand_per_s * u.bring_s, u.name),
    )
    dropped = []
    for unit in order:
        if excess <= 0:
            break
        dropped.append(unit.name)
        excess -= unit.host_bytes
    return dropped
