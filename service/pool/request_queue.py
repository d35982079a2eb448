"""The queue of one slot or remote endpoint, with waiting and running requests.

`FairQueue` makes the decisions and is pure: it has no I/O and no clock. `TicketQueue` wakes the
requests that wait.

Tenants take turns by tokens served (`tenant_fairness`). A tenant's own requests for ready experts
are served first come, first served, so that vLLM batches them together. A request for an expert
that is still loading doesn't hold up the others. A full queue sheds requests of the tenant with the
most load.

A running ticket takes one place of the engine for each of its answers, or for each prompt where
the request makes no answer. A waiting ticket also counts once for each `PROMPT_TOKENS` of its
prompt.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from service.errors import OverCapacityError
from service.pool.tenant_fairness import CLASSES, Fairness
from service.rpc.snapshot import Queue
from service.types import BATCH, NOBODY, Tenant

PROMPT_TOKENS = 2048
"""Prompt tokens that wait as one request."""

# Clients get this Retry-After where the pace of the queue is unknown.
_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0
# What pools publish of an expert without requests.
_NOTHING = Queue()


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the queue.

    Attributes:
        expert: The expert's name in this queue.
        arrived_s: When the request first arrived.
        tokens: The estimated number of tokens of its prompt.
        tenant: The tenant that sent it.
        again: Whether it ran before and was put back into the queue.
        running: Whether it runs. Otherwise it waits or has ended.
        places: The number of places of the engine that it takes.
        name: The name that its client asked for, where that is another one than the expert's.
    """

    expert: str
    arrived_s: float
    tokens: int = 1
    tenant: Tenant = NOBODY
    again: bool = False
    running: bool = False
    places: int = 1
    name: str | None = None

    @property
    def load(self) -> int:
        """The number of ordinary requests that this ticket counts as while it waits."""
        return max(self.places, -(-self.tokens // PROMPT_TOKENS))

    @property
    def of_batch(self) -> bool:
        """Whether it is a line of a batch."""
        return self.tenant.priority == BATCH

    @property
    def turn(self) -> tuple[int, str]:
        """The ticket's priority class and its tenant's name."""
        return CLASSES.get(self.tenant.priority, CLASSES["normal"]), self.tenant.name


@dataclass(frozen=True, slots=True)
class Backlog:
    """What runs and waits for one expert.

    Attributes:
        running: Places that running requests take.
        waiting: Places that waiting requests will take.
        waiting_load: The waiting load, in ordinary requests.
        oldest_s: When the oldest waiting request arrived; None where none waits.
    """

    running: int
    waiting: int
    waiting_load: int
    oldest_s: float | None


class FairQueue:
    """Waiting and running tickets, and the order in which they run.

    A ticket that is larger than the capacity counts as the whole capacity, so that it runs alone.
    A ticket that is larger than the bound on waiting counts as the whole bound in the same way.

    Args:
        experts: The names of the experts.
        capacity: The number of places that tickets may take at once.
        max_waiting: The load that may wait for each expert.
    """

    def __init__(self, experts: Iterable[str], *, capacity: int, max_waiting: int) -> None:
        self.capacity = capacity
        self._max_waiting = max_waiting
        self._waiting: dict[Ticket, None] = {}
        self._waiting_by: dict[str, dict[Ticket, None]] = {name: {} for name in experts}
        self._running_by: dict[str, dict[Ticket, None]] = {name: {} for name in experts}
        self._running = 0
        self._places_by = dict.fromkeys(experts, 0)
        self._places_taken = 0
        # The class and tenant that are next, although there is no room for them yet.
        self._next: tuple[int, str] | None = None
        self._present: Counter[str] = Counter()
        self._fairness = Fairness()
        self._ends_s: deque[float] = deque(maxlen=32)

    def add_expert(self, expert: str) -> None:
        """Let requests come for one more expert."""
        self._waiting_by.setdefault(expert, {})
        self._running_by.setdefault(expert, {})
        self._places_by.setdefault(expert, 0)

    def resize(self, capacity: int, max_waiting: int) -> None:
        """Change the bounds; tickets that run or wait already stay."""
        self.capacity, self._max_waiting = capacity, max_waiting
        for ticket in self._waiting:
            ticket.places = min(ticket.places, capacity)

    def offer(
        self,
        ticket: Ticket,
        *,
        ready: bool,
        keeps_place: bool = False,
    ) -> None:
        """Add a request. It runs at once if possible, and waits otherwise.

        Args:
            ticket: The request's ticket.
            ready: Whether its expert's requests may run now.
            keeps_place: Whether it has been in the queue since it arrived. It then gets its place
                back, ahead of all later requests, even in a full queue.

        Raises:
            OverCapacityError: The queue is full, and `tickets_to_shed` found nothing to shed.
        """
        expert, tenant = ticket.expert, ticket.tenant
        ticket.places = min(ticket.places, self.capacity)
        at_once = ready and not self._waiting and self._has_room(ticket)
        if not at_once and not keeps_place and self._lacks(ticket) > 0:
            raise self.overload_error(expert, ticket.name)
        self._fairness.arrived(tenant, self._present)
        self._present[tenant.name] += 1
        if at_once:
            self._run(ticket)
            return
        self._waiting[ticket] = self._waiting_by[expert][ticket] = None
        if keeps_place:
            self._waiting = _by_age(self._waiting)
            self._waiting_by[expert] = _by_age(self._waiting_by[expert])

    def tickets_to_shed(self, newcomer: Ticket) -> list[Ticket]:
        """Choose the tickets to shed so that a new ticket finds room in a full queue.

        The newest tickets of the tenants with the most load go first. A tenant never loses so much
        that it has less load than this tenant. In this way each tenant gets an equal part of the
        queue.

        Returns:
            The tickets. The list is empty where there is room already, or where shedding would
            not make enough room.
        """
        newcomer.places = min(newcomer.places, self.capacity)
        lacking = self._lacks(newcomer)
        if lacking <= 0:
            return []
        waiting = self.waiting_for(newcomer.expert)
        loads: Counter[str] = Counter()
        for ticket in waiting:
            loads[ticket.tenant.name] += ticket.load
        own = loads.pop(newcomer.tenant.name, 0) + newcomer.load
        shed: list[Ticket] = []
        while lacking > 0 and loads:
            most = max(loads, key=lambda name: (loads[name], name))
            newest = next(
                ticket
                for ticket in reversed(waiting)
                if ticket.tenant.name == most and ticket not in shed
            )
            loads[most] -= newest.load
            if loads[most] < own:
                return []
            shed.append(newest)
            lacking -= newest.load
        return shed if lacking <= 0 else []

    def _has_room(self, ticket: Ticket) -> bool:
        return self._places_taken + ticket.places <= self.capacity

    def _lacks(self, ticket: Ticket) -> int:
        """Return the load that must leave the queue before this ticket may wait."""
        load = min(ticket.load, max(1, self._max_waiting))
        return self.load(ticket.expert) + load - self._max_waiting

    def overload_error(self, expert: str, name: str | None = None) -> OverCapacityError:
        """Build the error for a request that the queue has no room for.

        The error's retry_after_s is about the time in which half of the queue is served.

        Args:
            expert: The expert that the request is for.
            name: The name that its client asked for, where that is another one.
        """
        waiting = len(self._waiting_by[expert])
        retry_s = _RETRY_S
        if len(self._ends_s) > 1:
            pace_s = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
            retry_s = min(_LONGEST_RETRY_S, max(_RETRY_S, pace_s * waiting / 2))
        load = self.load(expert)
        worth = "" if load == waiting else f", worth {load} usual ones,"
        return OverCapacityError(
            f"expert {(name or expert)!r} has {waiting} requests{worth} waiting, "
            f"and at most {self._max_waiting} may wait",
            retry_after_s=retry_s,
        )

    def grant(self, ready: set[str]) -> list[Ticket]:
        """Choose the tickets that may run now, in order, and mark them as running."""
        granted: list[Ticket] = []
        # The tickets for ready experts, by class and tenant, oldest first.
        turns: dict[tuple[int, str], deque[Ticket]] = {}
        if self._places_taken < self.capacity:
            for ticket in self._waiting:
                if ticket.expert in ready:
                    turns.setdefault(ticket.turn, deque()).append(ticket)
        while turns and self._places_taken < self.capacity:
            # A turn is kept until there is room. Otherwise smaller requests could always overtake.
            turn = self._next if self._next in turns else self._fairness.choose(turns)
            self._next = turn
            if not self._has_room(turns[turn][0]):
                break
            self._next = None
            ticket = turns[turn].popleft()
            if not turns[turn]:
                del turns[turn]
            self._remove(ticket)
            self._run(ticket)
            granted.append(ticket)
        return granted

    def served(self, ticket: Ticket, tokens: int) -> None:
        """Count answer tokens that a running ticket got."""
        self._fairness.served(ticket.tenant, tokens)

    def close(self, ticket: Ticket, now_s: float | None = None) -> None:
        """Free the places of a ticket whose request has ended. A second call does nothing.

        Args:
            ticket: The ticket.
            now_s: When a running request ended. The time counts for the pace of the queue. None
                means that the request does not count for the pace.
        """
        if ticket.running:
            ticket.running = False
            self._running -= 1
            self._places_taken -= ticket.places
            self._places_by[ticket.expert] -= ticket.places
            del self._running_by[ticket.expert][ticket]
            if now_s is not None:
                self._ends_s.append(now_s)
        elif ticket in self._waiting:
            self._remove(ticket)
        else:
            return
        self._present[ticket.tenant.name] -= 1
        if not self._present[ticket.tenant.name]:
            del self._present[ticket.tenant.name]

    def waiting_for(self, expert: str) -> list[Ticket]:
        """The tickets that wait for one expert, oldest first."""
        return list(self._waiting_by[expert])

    def counts(self, expert: str) -> tuple[int, int]:
        """The numbers of waiting and of running tickets of one expert."""
        return len(self._waiting_by[expert]), len(self._running_by[expert])

    def places(self, expert: str) -> int:
        """Return the places that one expert's tickets take, including waiting tickets."""
        waiting = sum(ticket.places for ticket in self._waiting_by[expert])
        return waiting + self._places_by[expert]

    def running_places(self, expert: str) -> int:
        """Return the places that one expert's running tickets take."""
        return self._places_by[expert]

    def load(self, expert: str) -> int:
        """Return the load that waits for one expert, in ordinary requests."""
        return sum(ticket.load for ticket in self._waiting_by[expert])

    def waiting_tokens(self, expert: str) -> int:
        """Return the number of prompt tokens that wait for one expert."""
        return sum(ticket.tokens for ticket in self._waiting_by[expert])

    def queue_of(self, expert: str, name: str) -> Queue:
        """Return the requests for an expert that asked for it by this name."""
        name_in = (None, name) if name == expert else (name,)
        waiting = [t for t in self._waiting_by[expert] if t.name in name_in]
        running = [t for t in self._running_by[expert] if t.name in name_in]
        return Queue(
            len(waiting),
            len(running),
            sum(ticket.places for ticket in (*waiting, *running)),
            sum(ticket.tokens for ticket in waiting),
            sum(ticket.of_batch for ticket in waiting),
            sum(ticket.of_batch for ticket in running),
        )

    def batch_counts(self, expert: str) -> tuple[int, int]:
        """The numbers of waiting and of running lines of batches for one expert."""
        waiting, running = self._waiting_by[expert], self._running_by[expert]
        return sum(t.of_batch for t in waiting), sum(t.of_batch for t in running)

    @property
    def total(self) -> int:
        """The number of tickets, waiting and running."""
        return len(self._waiting) + self._running

    @property
    def waiting(self) -> int:
        """The number of waiting tickets."""
        return len(self._waiting)

    def waiting_experts(self) -> set[str]:
        """Return the experts for which tickets wait."""
        return {ticket.expert for ticket in self._waiting}

    def _run(self, ticket: Ticket) -> None:
        ticket.running = True
        self._running += 1
        self._places_taken += ticket.places
        self._places_by[ticket.expert] += ticket.places
        self._running_by[ticket.expert][ticket] = None
        self._fairness.started(ticket.tenant, ticket.tokens)

    def _remove(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        del self._waiting_by[ticket.expert][ticket]


class TicketQueue:
    """A fair queue in which requests can wait for their turn.

    A request calls `enter`, then `wait`, and in every case `leave` at the end. All calls are made
    on one event loop.

    Args:
        experts: The names of the experts.
        capacity: The number of places that tickets may take at once.
        max_waiting: The load that may wait for each expert.
    """

    def __init__(self, experts: Iterable[str], *, capacity: int, max_waiting: int) -> None:
        self._queue = FairQueue(experts, capacity=capacity, max_waiting=max_waiting)
        self._turns: dict[Ticket, asyncio.Future[None]] = {}

    # --- one request

    def enter(
        self,
        ticket: Ticket,
        *,
        ready: bool,
        keeps_place: bool = False,
    ) -> None:
        """Add a request. A full queue sheds other requests for it where that is fair.

        The arguments are those of `FairQueue.offer`.

        Raises:
            OverCapacityError: The queue is full.
        """
        if not keeps_place:
            for other in self._queue.tickets_to_shed(ticket):
                self.refuse(other, self._queue.overload_error(other.expert, other.name))
        self._queue.offer(ticket, ready=ready, keeps_place=keeps_place)
        if not ticket.running:
            self._turns[ticket] = asyncio.get_running_loop().create_future()

    async def wait(self, ticket: Ticket) -> None:
        """Wait until a ticket runs. A refused ticket raises the error passed to `refuse`."""
        if (turn := self._turns.get(ticket)) is not None:
            await turn

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """Free the places of a request that has ended, failed or been abandoned."""
        self._turns.pop(ticket, None)
        self._queue.close(ticket, now_s)

    # --- all requests

    def grant(self, ready: set[str]) -> None:
        """Let as many requests for ready experts run as there is room for."""
        for ticket in self._queue.grant(ready):
            turn = self._turns.get(ticket)
            if turn is not None and not turn.done():
                turn.set_result(None)
            else:
                # The request's client left after the ticket was granted and before it ran.
                self._queue.close(ticket)

    def refuse(self, ticket: Ticket, error: Exception) -> None:
        """End the wait of a ticket with an error, and free its places at once."""
        turn = self._turns.pop(ticket, None)
        self._queue.close(ticket)
        if turn is not None and not turn.done():
            turn.set_exception(error)

    def refuse_waiting(self, expert: str, error: Callable[[Ticket], Exception]) -> None:
        """Refuse every ticket that waits for an expert. Each ticket gets its own error."""
        for ticket in self._queue.waiting_for(expert):
            self.refuse(ticket, error(ticket))

    def served(self, ticket: Ticket, tokens: int) -> None:
        """Count answer tokens that a running ticket got."""
        self._queue.served(ticket, tokens)

    # --- bounds and figures

    def add_expert(self, expert: str) -> None:
        """Let requests come for one more expert."""
        self._queue.add_expert(expert)

    def resize(self, capacity: int, max_waiting: int) -> None:
        """Change the bounds; tickets that run or wait already stay."""
        self._queue.resize(capacity, max_waiting)

    @property
    def capacity(self) -> int:
        """Places that may be taken at once."""
        return self._queue.capacity

    @property
    def total(self) -> int:
        """The number of tickets, waiting and running."""
        return self._queue.total

    @property
    def waiting(self) -> int:
        """The number of waiting tickets."""
        return self._queue.waiting

    def waiting_experts(self) -> set[str]:
        """Return the experts for which tickets wait."""
        return self._queue.waiting_experts()

    def waiting_for(self, expert: str) -> list[Ticket]:
        """The tickets that wait for one expert, oldest first."""
        return self._queue.waiting_for(expert)

    def counts(self, expert: str) -> tuple[int, int]:
        """The numbers of waiting and of running tickets of one expert."""
        return self._queue.counts(expert)

    def batch_counts(self, expert: str) -> tuple[int, int]:
        """The numbers of waiting and of running lines of batches for one expert."""
        return self._queue.batch_counts(expert)

    def backlog(self, expert: str) -> Backlog:
        """Return what runs and waits for one expert, for autoscaling."""
        queue = self._queue
        waiting = queue.waiting_for(expert)
        return Backlog(
            running=queue.running_places(expert),
            waiting=sum(ticket.places for ticket in waiting),
            waiting_load=queue.load(expert),
            oldest_s=waiting[0].arrived_s if waiting else None,
        )

    def snapshot(self, expert: str, name: str | None = None) -> Queue:
        """Return one expert's queue as pools publish it.

        Args:
            expert: The expert.
            name: Only requests that asked for it by this name; None for all requests.
        """
        queue = self._queue
        if not any(queue.counts(expert)):
            return _NOTHING
        if name is not None:
            return queue.queue_of(expert, name)
        return Queue(
            *queue.counts(expert),
            queue.places(expert),
            queue.waiting_tokens(expert),
            *queue.batch_counts(expert),
        )


def _by_age(tickets: Iterable[Ticket]) -> dict[Ticket, None]:
    """Sort tickets from old to new. Tickets with equal times keep their order."""
    return dict.fromkeys(sorted(tickets, key=lambda ticket: ticket.arrived_s))
