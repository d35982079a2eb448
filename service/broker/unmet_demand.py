"""The pool that unmet demand is reported to, and why an expert can't be served. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from service.broker.pool_state import PoolView
from service.broker.rendezvous_hash import rendezvous_hash
from service.rpc.snapshot import Queue
from service.types import Residency

_NEAR = (Residency.DEVICE, Residency.HOST, Residency.LOADING)
_EQUAL_LOAD = 16
"""Requests by which loads differ from one moment to the next: a few batches come and go."""


def can_serve(view: PoolView, expert: str) -> bool:
    """Whether a pool can serve an expert, now or after loading it."""
    state = view.snapshot.experts.get(expert)
    return state is not None and not view.snapshot.draining and state.state is not Residency.FAILED


def pool_for_demand(expert: str, views: Iterable[PoolView]) -> str | None:
    """The one pool to report an expert's unmet demand to: where loading it displaces least.

    A pool that has it in memory or is loading it comes first. Among the others, those with about
    the load of the least loaded one are equally good, and a rendezvous hash of expert and pool
    chooses. So gateways agree without communication, though each sees the loads of another moment.
    """
    able = [view for view in views if can_serve(view, expert)]
    near = [view for view in able if view.snapshot.experts[expert].state in _NEAR]
    loads = {view.boot: _displaced_requests(expert, view) for view in near or able}
    if not loads:
        return None
    bound = 2 * min(loads.values()) + _EQUAL_LOAD
    equal = (boot for boot, load in loads.items() if load <= bound)
    return min(equal, key=lambda boot: rendezvous_hash(expert, boot))


def _displaced_requests(expert: str, view: PoolView) -> int:
    """Requests of the experts that would leave the slot which the expert is loaded into."""
    snapshot = view.snapshot
    slot, weights = snapshot.experts[expert].slot, snapshot.weights_of(expert)
    queues = (
        snapshot.queues.get(name, Queue())
        for name, other in snapshot.experts.items()
        if other.slot == slot and snapshot.weights_of(name) != weights
    )
    return sum(queue.waiting + queue.running for queue in queues)


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
