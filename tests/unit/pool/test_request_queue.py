"""The queue of one slot."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import OverCapacityError
from service.pool.request_queue import FairQueue, Ticket
from service.types import Tenant


def queues(capacity: int = 2, max_waiting: int = 3) -> FairQueue:
    return FairQueue(("a", "b"), capacity=capacity, max_waiting=max_waiting)


def offer(q: FairQueue, expert: str, arrived_s: float, *, ready: bool, **fields: Any) -> Ticket:
    ticket = Ticket(expert, arrived_s, **fields)
    q.offer(ticket, ready=ready)
    return ticket


def test_offer_with_free_capacity_runs_at_once() -> None:
    q = queues()
    assert offer(q, "a", 0, ready=True).running
    assert not offer(q, "b", 0, ready=False).running
    assert q.counts("a") == (0, 1)
    assert q.counts("b") == (1, 0)
    assert q.total == 2


def test_offer_while_others_wait_does_not_overtake_them() -> None:
    q = queues(capacity=1)
    first = offer(q, "a", 0, ready=True)
    second = offer(q, "a", 1, ready=True)
    q.close(first)
    third = offer(q, "a", 2, ready=True)
    assert not third.running
    assert q.grant({"a"}) == [second]


def test_grant_skips_experts_that_are_still_loading() -> None:
    q = queues(capacity=1)
    loading = offer(q, "b", 0, ready=False)
    ready = offer(q, "a", 1, ready=True)
    assert q.grant({"a"}) == [ready]
    assert not loading.running
    q.close(ready)
    assert q.grant({"a", "b"}) == [loading]


def test_offer_beyond_an_expert_s_max_waiting_raises_over_capacity() -> None:
    q = queues(capacity=1, max_waiting=1)
    offer(q, "a", 0, ready=True)
    offer(q, "a", 0, ready=True)
    offer(q, "b", 0, ready=True)
    with pytest.raises(OverCapacityError) as caught:
        offer(q, "a", 0, ready=True)
    assert caught.value.message == "expert 'a' has 1 requests waiting, and at most 1 may wait"
    assert q.total == 3


def test_close_twice_frees_the_place_once() -> None:
    q = queues(capacity=1)
    running = offer(q, "a", 0, ready=True)
    waiting = offer(q, "a", 0, ready=True)
    for _ in range(2):
        q.close(running)
        q.close(waiting)
    assert q.total == 0
    assert q.counts("a") == (0, 0)
    assert offer(q, "a", 0, ready=True).running


def test_waiting_for_expert_is_oldest_first() -> None:
    q = queues()
    first = offer(q, "b", 0, ready=False)
    offer(q, "a", 0, ready=False)
    second = offer(q, "b", 1, ready=False)
    assert q.waiting_for("b") == [first, second]


def test_offer_with_several_places_is_not_overtaken_by_smaller_requests() -> None:
    q = queues(capacity=4, max_waiting=9)
    first = offer(q, "a", 0, ready=True, places=3)
    assert first.running
    big = offer(q, "a", 1, ready=True, places=3)
    small = offer(q, "a", 2, ready=True)
    assert not big.running
    assert q.grant({"a"}) == []
    assert not small.running
    q.close(first)
    assert q.grant({"a"}) == [big, small]


def test_offer_with_more_places_than_capacity_runs_alone() -> None:
    q = queues(capacity=2, max_waiting=3)
    huge = offer(q, "a", 0, ready=True, places=128)
    assert (huge.running, huge.places) == (True, 2)
    assert not offer(q, "a", 1, ready=True).running


def test_offer_long_prompt_counts_as_several_waiting_requests() -> None:
    q = queues(capacity=1, max_waiting=20)
    offer(q, "a", 0, ready=True)
    offer(q, "a", 0, ready=True, tokens=30_000)
    assert (q.counts("a"), q.load("a"), q.waiting_tokens("a")) == ((1, 1), 15, 30_000)
    with pytest.raises(OverCapacityError, match="1 requests, worth 15 usual ones, waiting"):
        offer(q, "a", 0, ready=True, tokens=30_000)
    offer(q, "a", 0, ready=True, tokens=10_000)


def test_offer_prompt_longer_than_the_queue_waits_only_in_an_empty_queue() -> None:
    q = queues(capacity=1, max_waiting=3)
    offer(q, "a", 0, ready=True)
    offer(q, "a", 0, ready=True, tokens=10**6)
    with pytest.raises(OverCapacityError):
        offer(q, "a", 0, ready=True)


def test_tickets_to_shed_takes_from_the_heaviest_tenant_as_much_as_needed() -> None:
    q = queues(capacity=1, max_waiting=8)
    heavy, small = Tenant("heavy"), Tenant("small")
    offer(q, "a", 0, ready=True, tenant=heavy)
    waiting = [offer(q, "a", 0, ready=True, tenant=heavy, places=1) for _ in range(8)]
    assert q.tickets_to_shed(Ticket("a", 0, 3 * 2048, small)) == waiting[:-4:-1]
    # More than an equal part is nobody's.
    assert q.tickets_to_shed(Ticket("a", 0, 5 * 2048, small)) == []


def test_resize_to_fewer_places_lets_wide_tickets_run_alone() -> None:
    q = queues(capacity=4)
    first = offer(q, "a", 0, ready=True, places=2)
    wide = offer(q, "a", 1, ready=True, places=4)
    q.resize(1, 3)
    q.close(first)
    assert q.grant({"a"}) == [wide]
    q.resize(3, 3)
    assert q.grant({"a"}) == []
    assert offer(q, "a", 2, ready=True, places=2).running
