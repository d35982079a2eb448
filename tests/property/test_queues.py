"""Queues under any order of arrivals, endings and loads."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.errors import OverCapacityError
from service.pool.request_queue import PROMPT_TOKENS, FairQueue, Ticket

EXPERTS = ("a", "b", "c")
CAPACITY = 3
MAX_WAITING = 4
experts = st.sampled_from(EXPERTS)


class QueuesMachine(RuleBasedStateMachine):
    """A model beside the real thing: who is in, who runs, in order of arrival."""

    def __init__(self) -> None:
        super().__init__()
        self.queues = FairQueue(EXPERTS, capacity=CAPACITY, max_waiting=MAX_WAITING)
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.ended: list[Ticket] = []
        self.now_s = 0.0

    def taken(self) -> int:
        return sum(ticket.places for ticket in self.running)

    @rule(
        expert=experts,
        ready=st.booleans(),
        places=st.sampled_from([1, 1, 1, 2, 3, 9]),
        tokens=st.sampled_from([1, 1, 2048, 2049, 30_000]),
    )
    def offer(self, expert: str, ready: bool, places: int, tokens: int) -> None:
        self.now_s += 1
        places_taken = min(places, CAPACITY)
        load = min(MAX_WAITING, max(places_taken, -(-tokens // PROMPT_TOKENS)))
        full = sum(t.load for t in self.waiting if t.expert == expert) + load > MAX_WAITING
        at_once = ready and self.taken() + places_taken <= CAPACITY and not self.waiting
        try:
            ticket = Ticket(expert, self.now_s, tokens, places=places)
            self.queues.offer(ticket, ready=ready)
        except OverCapacityError:
            assert full
            assert not at_once
            return
        assert ticket.running == at_once
        assert at_once or not full
        assert ticket.places == places_taken
        (self.running if at_once else self.waiting).append(ticket)

    @rule(ready=st.sets(experts))
    def grant(self, ready: set[str]) -> None:
        expected = []
        room = CAPACITY - self.taken()
        for ticket in (t for t in self.waiting if t.expert in ready):
            if ticket.places > room:
                break
            room -= ticket.places
            expected.append(ticket)
        granted = self.queues.grant(ready)
        # First come, first served among the ready, and no place is left empty but for who is next.
        assert granted == expected
        assert all(ticket.running for ticket in granted)
        self.running += granted
        self.waiting = [t for t in self.waiting if t not in granted]

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data(), twice=st.booleans())
    def close(self, data: st.DataObject, twice: bool) -> None:
        ticket = data.draw(st.sampled_from(self.waiting + self.running))
        self.queues.close(ticket)
        if twice:
            self.queues.close(ticket)
        (self.running if ticket in self.running else self.waiting).remove(ticket)
        self.ended.append(ticket)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def close_an_old_one(self, data: st.DataObject) -> None:
        self.queues.close(data.draw(st.sampled_from(self.ended)))

    @invariant()
    def counts_hold(self) -> None:
        assert self.taken() <= CAPACITY
        assert self.queues.total == len(self.waiting) + len(self.running)
        for expert in EXPERTS:
            waits = [t for t in self.waiting if t.expert == expert]
            runs = sum(t.expert == expert for t in self.running)
            assert len(waits) <= 1 or sum(t.load for t in waits) <= MAX_WAITING
            assert self.queues.places(expert) == sum(
                t.places for t in self.waiting + self.running if t.expert == expert
            )
            assert self.queues.waiting_tokens(expert) == sum(t.tokens for t in waits)
            assert self.queues.counts(expert) == (len(waits), runs)
            assert self.queues.waiting_for(expert) == waits
        assert all(ticket.running for ticket in self.running)
        assert not any(ticket.running for ticket in self.waiting + self.ended)


TestQueues = QueuesMachine.TestCase
