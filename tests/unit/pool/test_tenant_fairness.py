"""Tenants in one queue: shares by tokens and weights, priorities, and load shedding."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import OverCapacityError
from service.pool.request_queue import FairQueue, Ticket
from service.pool.tenant_fairness import STARVE
from service.types import Tenant

READY = {"e"}


def queues(capacity: int = 1, max_waiting: int = 1000) -> FairQueue:
    return FairQueue(("e",), capacity=capacity, max_waiting=max_waiting)


def offer(q: FairQueue, tenant: Tenant, tokens: int = 1) -> Ticket:
    ticket = Ticket("e", 0.0, tokens, tenant)
    q.offer(ticket, ready=True)
    return ticket


def serve(q: FairQueue, running: Ticket, answer: int = 0) -> Ticket:
    """End the running one; who is next."""
    q.served(running, answer)
    q.close(running)
    (following,) = q.grant(READY)
    return following


def test_grant_new_tenant_is_next_despite_another_tenant_s_backlog() -> None:
    q = queues()
    heavy, small = Tenant("heavy"), Tenant("small")
    running = offer(q, heavy)
    for _ in range(50):
        offer(q, heavy)
    one = offer(q, small)
    assert serve(q, running) is one


def test_grant_tenant_that_was_idle_gets_no_credit() -> None:
    q = queues()
    a, b = Tenant("a"), Tenant("b")
    running = offer(q, a)
    for _ in range(100):
        offer(q, a, 10)
        running = serve(q, running)
    for tenant in (a, b) * 20:
        offer(q, tenant, 10)
    turns = []
    for _ in range(20):
        running = serve(q, running)
        turns.append(running.tenant.name)
    assert 9 <= Counter(turns)["b"] <= 11


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=2, max_size=4),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), min_size=40, max_size=40),
)
def test_grant_shares_follow_tokens_and_weights(
    weights: list[int], sizes: list[tuple[int, int]]
) -> None:
    q = queues()
    tenants = [Tenant(str(i), weight=w) for i, w in enumerate(weights)]
    running = offer(q, tenants[0], 1)
    answers: dict[Ticket, int] = {running: 0}
    for tenant in tenants:
        for prompt, answer in sizes:
            answers[offer(q, tenant, prompt)] = answer
    served = Counter({"0": 1.0})
    while True:
        running = serve(q, running, answers[running])
        served[running.tenant.name] += (running.tokens + answers[running]) / running.tenant.weight
        if min(Counter(t.tenant.name for t in q.waiting_for("e")).get(t.name, 0) for t in tenants):
            # Nobody is ahead by more than one request of the greatest size.
            bound = 2 * 240 / min(weights)
            assert max(served.values()) - min(served[t.name] for t in tenants) <= bound
        else:
            break


def test_grant_higher_priority_goes_first_without_starving_the_lower() -> None:
    q = queues()
    kinds = [Tenant(p, priority=p) for p in ("high", "normal", "low")]
    running = offer(q, kinds[0])
    for _ in range(200):
        for kind in kinds:
            offer(q, kind)
    order = []
    for _ in range(100):
        running = serve(q, running)
        order.append(running.tenant.priority)
    assert order[:STARVE] == ["high"] * STARVE
    for kind in ("normal", "low"):
        gaps = [i for i, name in enumerate(order) if name == kind]
        assert max(b - a for a, b in itertools.pairwise(gaps)) <= STARVE + 2
    assert order.count("high") > 70


def test_tickets_to_shed_full_queue_takes_from_the_heaviest_tenant() -> None:
    q = queues(max_waiting=6)
    heavy, small = Tenant("heavy"), Tenant("small")
    offer(q, heavy)
    waiting = [offer(q, heavy) for _ in range(6)]
    with pytest.raises(OverCapacityError):
        offer(q, heavy)
    assert q.tickets_to_shed(Ticket("e", 0.0, tenant=heavy)) == []
    for i in range(3):
        (gone,) = q.tickets_to_shed(Ticket("e", 0.0, tenant=small))
        assert gone is waiting[-1 - i]
        q.close(gone)
        offer(q, small)
    assert q.tickets_to_shed(Ticket("e", 0.0, tenant=small)) == []
    with pytest.raises(OverCapacityError):
        offer(q, small)


def test_overload_error_retry_after_is_when_half_the_queue_is_gone() -> None:
    q = queues(max_waiting=40)
    running = offer(q, Tenant())
    for _ in range(40):
        offer(q, Tenant())
    assert q.overload_error("e").retry_after_s == 1.0
    for i in range(5):
        q.close(running, now_s=i * 0.5)
        (running,) = q.grant(READY)
        offer(q, Tenant())
    assert q.overload_error("e").retry_after_s == pytest.approx(10.0)
