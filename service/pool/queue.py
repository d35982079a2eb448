"""Who waits and who runs in one slot. Pure: no I/O, no clock of its own.

Tenants take turns by tokens served (see `fairness`); a tenant's own requests are first
come, first served among the experts that are ready, so that vLLM batches them
together. A request for an expert that is still loading waits without holding up the
others. Where a queue is full, it is the tenant that fills it most who is refused.

A ticket weighs what its request asks: running, a place of the engine for each of its answers
(or prompts, where it makes none); waiting, also one for each `PROMPT_TOKENS` of its prompt.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import OverCapacityError
from service.pool.fairness import CLASSES, Fairness
from service.types import NOBODY, Tenant

PROMPT_TOKENS = 2048
"""So many tokens of prompts wait as one request."""

# A place that nobody knows the pace of.
_RETRY_S = 1.0
_LONGEST_RETRY_S = 60.0


@dataclass(eq=False, slots=True)
class Ticket:
    """One request in the queue. `tokens`: about how much work its prompt is.

    `places`: how many of the engine's it takes. `again`: it was put back here.
    """

    expert: str
    arrived_s: float
    tokens: int = 1
    tenant: Tenant = NOBODY
    again: bool = False
    running: bool = False
    places: int = 1

    @property
    def load(self) -> int:
        """How many usual requests it waits as."""
        return max(self.places, -(-self.tokens // PROMPT_TOKENS))

    @property
    def turn(self) -> tuple[int, str]:
        """Its priority class and its tenant's name."""
        return CLASSES.get(self.tenant.priority, CLASSES["normal"]), self.tenant.name


class TicketQueue:
    """Waiting and running tickets of one slot.

    capacity: places that may be taken at once; max_waiting: load that may wait per expert. What
    weighs more than there is, weighs as much as there is: it runs, or waits, alone.
    """

    def __init__(self, experts: Iterable[str], *, capacity: int, max_waiting: int) -> None:
        self.capacity = capacity
        self._max_waiting = max_waiting
        self._waiting: dict[Ticket, None] = {}
        self._waiting_by: dict[str, dict[Ticket, None]] = {name: {} for name in experts}
        self._running_by = dict.fromkeys(experts, 0)
        self._running = 0
        self._places_by = dict.fromkeys(experts, 0)
        self._places_taken = 0
        # Whose turn it is, though there is no room for it yet.
        self._next: tuple[int, str] | None = None
        self._present: Counter[str] = Counter()
        self._fairness = Fairness()
        self._ends_s: deque[float] = deque(maxlen=32)

    def welcome(self, expert: str) -> None:
        """One more expert that requests may come for."""
        self._waiting_by.setdefault(expert, {})
        self._running_by.setdefault(expert, 0)
        self._places_by.setdefault(expert, 0)

    def resize(self, capacity: int, max_waiting: int) -> None:
        """Other bounds from now on; who runs or waits already stays."""
        self.capacity, self._max_waiting = capacity, max_waiting
        for ticket in self._waiting:
            ticket.places = min(ticket.places, capacity)

    def offer(
        self,
        expert: str,
        now_s: float,
        *,
        ready: bool,
        tokens: int = 1,
        places: int = 1,
        tenant: Tenant = NOBODY,
        again: bool = False,
        named: str = "",
    ) -> Ticket:
        """Take a request in: running at once where it can, else waiting. Raises OverCapacityError.

        `named`: what the expert is called, where it is called otherwise here. Where the queue is
        full for it, see `crowded_out` first. `again`: it had a place since `now_s`, and gets that
        one back before all who came later, however full it is.
        """
        ticket = Ticket(expert, now_s, tokens, tenant, again, places=min(places, self.capacity))
        at_once = ready and not self._waiting and self._has_room(ticket)
        if not at_once and not again and self._lacks(ticket) > 0:
            raise self.full(expert, named)
        self._fairness.arrived(tenant, self._present)
        self._present[tenant.name] += 1
        if at_once:
            self._run(ticket)
            return ticket
        self._waiting[ticket] = self._waiting_by[expert][ticket] = None
        if again:
            self._waiting = _by_age(self._waiting)
            self._waiting_by[expert] = _by_age(self._waiting_by[expert])
        return ticket

    def ticket_to_shed(
        self, expert: str, tenant: Tenant, *, tokens: int = 1, places: int = 1
    ) -> list[Ticket]:
        """Whose tickets have to go so that this tenant's request finds room in a full queue.

        The newest of the tenants that have most waiting there, while each has still no less than
        this one will have then: so each gets an equal part of the queue. None where that would
        not make room enough.
        """
        wanted = Ticket(expert, 0.0, tokens, tenant, places=min(places, self.capacity))
        lacking = self._lacks(wanted)
        if lacking <= 0:
            return []
        waiting = self.waiting_for(expert)
        loads: Counter[str] = Counter()
        for ticket in waiting:
            loads[ticket.tenant.name] += ticket.load
        mine = loads.pop(tenant.name, 0) + wanted.load
        gone: list[Ticket] = []
        while lacking > 0 and loads:
            most = max(loads, key=lambda name: (loads[name], name))
            newest = next(
                one for one in reversed(waiting) if one.tenant.name == most and one not in gone
            )
            loads[most] -= newest.load
            if loads[most] < mine:
                return []
            gone.append(newest)
            lacking -= newest.load
        return gone if lacking <= 0 else []

    def _has_room(self, ticket: Ticket) -> bool:
        return self._places_taken + ticket.places <= self.capacity

    def _lacks(self, ticket: Ticket) -> int:
        """How much load has to go before this one may wait."""
        load = min(ticket.load, max(1, self._max_waiting))
        return self.load(ticket.expert) + load - self._max_waiting

    def full(self, expert: str, named: str = "") -> OverCapacityError:
        """What a request is told that finds no place. Half the queue should be gone by then.

        `named`: what the expert is called, where it is called otherwise here.
        """
        waiting = len(self._waiting_by[expert])
        retry_s = _RETRY_S
        if len(self._ends_s) > 1:
            pace_s = (self._ends_s[-1] - self._ends_s[0]) / (len(self._ends_s) - 1)
            retry_s = min(_LONGEST_RETRY_S, max(_RETRY_S, pace_s * waiting / 2))
        load = self.load(expert)
        worth = "" if load == waiting else f", worth {load} usual ones,"
        return OverCapacityError(
            f"expert {(named or expert)!r} has {waiting} requests{worth} waiting, "
            f"and no more than {self._max_waiting} may",
            retry_after_s=retry_s,
        )

    def grant(self, ready: set[str]) -> list[Ticket]:
        """The tickets that may run now, in turn. They count as running from here on."""
        granted: list[Ticket] = []
        # Each tenant's tickets by class, oldest first, of the experts that are ready.
        turns: dict[tuple[int, str], deque[Ticket]] = {}
        if self._places_taken < self.capacity:
            for ticket in self._waiting:
                if ticket.expert in ready:
                    turns.setdefault(ticket.turn, deque()).append(ticket)
        while turns and self._places_taken < self.capacity:
            # Who has the turn keeps it until there is room: nobody smaller overtakes for ever.
            turn = self._next if self._next in turns else self._fairness.choose(turns)
            self._next = turn
            if not self._has_room(turns[turn][0]):
                break
            self._next = None
            ticket = turns[turn].popleft()
            if not turns[turn]:
                del turns[turn]
            self._forget(ticket)
            self._run(ticket)
            granted.append(ticket)
        return granted

    def served(self, ticket: Ticket, tokens: int) -> None:
        """A running ticket has been given so many tokens of answer."""
        self._fairness.served(ticket.tenant, tokens)

    def close(self, ticket: Ticket, now_s: float | None = None) -> None:
        """A ticket's request has ended, been given up, or failed: whatever it held is free."""
        if ticket.running:
            ticket.running = False
            self._running -= 1
            self._places_taken -= ticket.places
            self._places_by[ticket.expert] -= ticket.places
            self._running_by[ticket.expert] -= 1
            if now_s is not None:
                self._ends_s.append(now_s)
        elif ticket in self._waiting:
            self._forget(ticket)
        else:
            return
        self._present[ticket.tenant.name] -= 1
        if not self._present[ticket.tenant.name]:
            del self._present[ticket.tenant.name]

    def waiting_for(self, expert: str) -> list[Ticket]:
        """Tickets that wait for one expert, oldest first."""
        return list(self._waiting_by[expert])

    def counts(self, expert: str) -> tuple[int, int]:
        """How many wait and how many run for one expert."""
        return len(self._waiting_by[expert]), self._running_by[expert]

    def places(self, expert: str) -> int:
        """Places of the engine that those who wait or run for one expert take together."""
        waiting = sum(ticket.places for ticket in self._waiting_by[expert])
        return waiting + self._places_by[expert]

    def load(self, expert: str) -> int:
        """What waits for one expert, in usual requests."""
        return sum(ticket.load for ticket in self._waiting_by[expert])

    def waiting_tokens(self, expert: str) -> int:
        """Tokens of the prompts that wait for one expert."""
        return sum(ticket.tokens for ticket in self._waiting_by[expert])

    @property
    def total(self) -> int:
        """All tickets, waiting and running."""
        return len(self._waiting) + self._running

    def _run(self, ticket: Ticket) -> None:
        ticket.running = True
        self._running += 1
        self._places_taken += ticket.places
        self._places_by[ticket.expert] += ticket.places
        self._running_by[ticket.expert] += 1
        self._fairness.started(ticket.tenant, ticket.tokens)

    def _forget(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        del self._waiting_by[ticket.expert][ticket]


def _by_age(tickets: Iterable[Ticket]) -> dict[Ticket, None]:
    """Oldest first; equal times stay in the order in which they came."""
    return dict.fromkeys(sorted(tickets, key=lambda one: one.arrived_s))
