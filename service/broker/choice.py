"""Choosing where a request goes. Pure: what is known of the pools comes in as data.

Experts are tried in order of preference; among the pools that hold one, the
shortest predicted wait wins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.link.snapshot import STALE_S, Snapshot, Speed
from service.types import Residency

_FIRST_GUESS_S = 0.2


@dataclass(frozen=True, slots=True)
class PoolView:
    """What a gateway knows of one pool.

    `unseen`: requests sent that the snapshot can't count yet, by expert.
    """

    boot: str
    snapshot: Snapshot
    age_s: float
    unseen: dict[str, int]


@dataclass(frozen=True, slots=True)
class Option:
    """A way to answer: an expert in a pool (`boot`), or a remote one (`boot` None)."""

    expert: str
    boot: str | None
    wait_s: float


def predicted_wait_s(view: PoolView, expert: str) -> float:
    """Time to the first byte: loading, the requests ahead in full batches, and prefill."""
    snapshot = view.snapshot
    first_s = snapshot.speeds.get(expert, Speed()).first_s or _FIRST_GUESS_S
    ahead = view.unseen.get(expert, 0)
    # Experts of one slot share its places; all queues of the pool are a fair stand-in.
    for queue in snapshot.queues.values():
        ahead += queue.waiting + queue.running
    capacity = max(1, snapshot.capacity.get(expert, 1))
    return snapshot.experts[expert].eta_s + first_s * (1 + ahead / capacity)


def options(
    preference: Sequence[str], remote: frozenset[str], views: Iterable[PoolView]
) -> list[Option]:
    """Every way to answer, best first.

    A pool that drains or has failed to load the expert is none; one not heard of for
    over a second comes after all that were.
    """
    fresh: list[Option] = []
    stale: list[Option] = []
    known = list(views)
    for expert in preference:
        if expert in remote:
            fresh.append(Option(expert, None, 0.0))
            continue
        for_this: list[tuple[bool, Option]] = []
        for view in known:
            state = view.snapshot.experts.get(expert)
            if state is None or view.snapshot.draining or state.state is Residency.FAILED:
                continue
            option = Option(expert, view.boot, predicted_wait_s(view, expert))
            for_this.append((view.age_s > STALE_S, option))
        for_this.sort(key=lambda pair: (pair[1].wait_s, pair[1].boot))
        fresh += [option for old, option in for_this if not old]
        stale += [option for old, option in for_this if old]
    return fresh + stale


def failure_reason(expert: str, views: Iterable[PoolView]) -> str | None:
    """Why no pool has the expert, if every pool that should have it failed to load it."""
    reasons = []
    for view in views:
        state = view.snapshot.experts.get(expert)
        if state is None:
            continue
        if state.state is not Residency.FAILED:
            return None
        reasons.append(state.reason)
    return reasons[0] if reasons else None
