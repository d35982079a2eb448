"""The pool that unmet demand is reported to, and why an expert can't be served. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from service.broker.pool_state import PoolView
from service.rpc.snapshot import Queue
from service.types import Residency

_NEAR = (Residency.DEVICE, Residency.HOST, Residency.LOADING)


def can_serve(view: PoolView, expert: str) -> bool:
    """Whether a pool can serve an expert, now or after loading it."""
    state = view.snapshot.experts.get(expert)
    return state is not None and not view.snapshot.draining and state.state is not Residency.FAILED


def pool_for_demand(expert: str, views: Iterable[PoolView]) -> str | None:
    """The one pool to report an expert's unmet demand to: where loading it displaces least.

    A pool that has it in memory or is loading it comes first. Loads are compared by powers of two,
    and ties are broken by a rendezvous hash of expert and pool, so that gateways with slightly
    different snapshots agree without communication.
    """

    def key(view: PoolView) -> tuple[int, int, bytes]:
        snapshot = view.snapshot
        state = snapshot.experts[expert]
        load = 0
        for name, other in snapshot.experts.items():
            same = snapshot.weights_of(name) == snapshot.weights_of(expert)
            if other.slot == state.slot and not same:
                queue = snapshot.queues.get(name, Queue())
                load += queue.waiting + queue.running
        digest = hashlib.blake2b(f"{expert}\0{view.boot}".encode(), digest_size=8).digest()
        return 0 if state.state in _NEAR else 1, load.bit_length(), digest

    able = [view for view in views if can_serve(view, expert)]
    return min(able, key=key).boot if able else None


def failure_reason(expert: str, views: Iterable[PoolView]) -> str | None:
    """The reason of failure, if every pool that should have the expert failed to load it."""
    reasons = []
    for view in views:
        state = view.snapshot.experts.get(expert)
        if state is None:
            continue
        if state.state is not Residency.FAILED:
            return None
        reasons.append(state.reason)
    return reasons[0] if reasons else None
