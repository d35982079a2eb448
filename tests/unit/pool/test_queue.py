"""The queue of one slot."""

from __future__ import annotations

import pytest

from service.errors import OverCapacityError
from service.pool.queue import FairQueue
from service.types import Tenant


def queues(capacity: int = 2, max_waiting: int = 3) -> FairQueue:
    return FairQueue(("a", "b"), capacity=capacity, max_waiting=max_waiting)


def test_offer_with_free_capacity_runs_at_once() -> None:
    q = queues()
    assert q.offer("a", 0, ready=True).running
    assert not q.offer("b", 0, ready=False).running
    assert q.counts("a") == (0, 1)
    assert q.counts("b") == (1, 0)
    assert q.total == 2


def test_offer_while_others_wait_does_not_overtake_them() -> None:
    q = queues(capacity=1)
    first = q.offer("a", 0, ready=True)
    second = q.offer("a", 1, ready=True)
    q.close(first)
    third = q.offer("a", 2, ready=True)
    assert not third.running
    assert q.grant({"a"}) == [second]


def test_grant_skips_experts_that_are_still_loading() -> None:
    q = queues(capacity=1)
    loading = q.offer("b", 0, ready=False)
    ready = q.offer("a", 1, ready=True)
    assert q.grant({"a"}) == [ready]
    assert not loading.running
    q.close(ready)
    assert q.grant({"a", "b"}) == [loading]


def test_offer_beyond_an_expert_s_max_waiting_raises_over_capacity() -> None:
    q = queues(capacity=1, max_waiting=1)
    q.offer("a", 0, ready=True)
    q.offer("a", 0, ready=True)
    q.offer("b", 0, ready=True)
    with pytest.raises(OverCapacityError) as caught:
        q.offer("a", 0, ready=True)
    assert caught.value.message == "expert 'a' has 1 requests waiting, and no more than 1 may"
    assert q.total == 3


def test_close_twice_frees_the_place_once() -> None:
    q = queues(capacity=1)
    running = q.offer("a", 0, ready=True)
    waiting = q.offer("a", 0, ready=True)
    for _ in range(2):
        q.close(running)
        q.close(waiting)
    assert q.total == 0
    assert q.counts("a") == (0, 0)
    assert q.offer("a", 0, ready=True).running


def test_waiting_for_expert_is_oldest_first() -> None:
    q = queues()
    first = q.offer("b", 0, ready=False)
    q.offer("a", 0, ready=False)
    second = q.offer("b", 1, ready=False)
    assert q.waiting_for("b") == [first, second]


def test_offer_with_several_places_is_not_overtaken_by_smaller_requests() -> None:
    q = queues(capacity=4, max_waiting=9)
    first = q.offer("a", 0, ready=True, places=3)
    assert first.running
    big = q.offer("a", 1, ready=True, places=3)
    small = q.offer("a", 2, ready=True)
    assert not big.running
    assert q.grant({"a"}) == []
    assert not small.running
    q.close(first)
    assert q.grant({"a"}) == [big, small]


def test_offer_with_more_places_than_capacity_runs_alone() -> None:
    q = queues(capacity=2, max_waiting=3)
    huge = q.offer("a", 0, ready=True, places=128)
    assert (huge.running, huge.places) == (True, 2)
    assert not q.offer("a", 1, ready=True).running


def test_offer_long_prompt_counts_as_several_waiting_requests() -> None:
    q = queues(capacity=1, max_waiting=20)
    q.offer("a", 0, ready=True)
    q.offer("a", 0, ready=True, tokens=30_000)
    assert (q.counts("a"), q.load("a"), q.waiting_tokens("a")) == ((1, 1), 15, 30_000)
    with pytest.raises(OverCapacityError, match="1 requests, worth 15 usual ones, waiting"):
        q.offer("a", 0, ready=True, tokens=30_000)
    q.offer("a", 0, ready=True, tokens=10_000)


def test_offer_prompt_longer_than_the_queue_waits_only_in_an_empty_queue() -> None:
    q = queues(capacity=1, max_waiting=3)
    q.offer("a", 0, ready=True)
    q.offer("a", 0, ready=True, tokens=10**6)
    with pytest.raises(OverCapacityError):
        q.offer("a", 0, ready=True)


def test_ticket_to_shed_takes_from_the_heaviest_tenant_as_much_as_needed() -> None:
    q = queues(capacity=1, max_waiting=8)
    heavy, small = Tenant("heavy"), Tenant("small")
    q.offer("a", 0, ready=True, tenant=heavy)
    waiting = [q.offer("a", 0, ready=True, tenant=heavy, places=1) for _ in range(8)]
    assert q.ticket_to_shed("a", small, tokens=3 * 2048) == waiting[:-4:-1]
    # More than an equal part is nobody's.
    assert q.ticket_to_shed("a", small, tokens=5 * 2048) == []


def test_resize_to_fewer_places_lets_wide_tickets_run_alone() -> None:
    q = queues(capacity=4)
    first = q.offer("a", 0, ready=True, places=2)
    wide = q.offer("a", 1, ready=True, places=4)
    q.resize(1, 3)
    q.close(first)
    assert q.grant({"a"}) == [wide]
    q.resize(3, 3)
    assert q.grant({"a"}) == []
    assert q.offer("a", 2, ready=True, places=2).running
