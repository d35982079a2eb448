"""Who waits and who runs in one slot. Pure: no I/O, no clock of its own.

First come, first served among the experts that are ready, so that vLLM batches
them together; a request for an expert that is still loading waits without
holding up the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import OverCapacity


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's place in the queue. `tokens`: about how much work it is."""

    expert: str
    arrived_s: float
    tokens: int = 1
    running: bool = False


class Queues:
    """Waiting and running tickets of one slot.

    capacity: tickets that may run at once; max_waiting: tickets that may wait per expert.
    """

    def __init__(self, experts: Iterable[str], *, capacity: int, max_waiting: int) -> None:
        self.capacity = capacity
        self._max_waiting = max_waiting
        self._waiting: dict[Ticket, None] = {}
        self._waiting_by = dict.fromkeys(experts, 0)
        self._running_by = dict.fromkeys(experts, 0)
        self._running = 0

    def offer(self, expert: str, now_s: float, *, ready: bool, tokens: int = 1) -> Ticket:
        """Take a request in: running at once where it can, else waiting. Raises OverCapacity."""
        ticket = Ticket(expert, now_s, tokens)
        if ready and self._running < self.capacity and not self._waiting:
            self._run(ticket)
            return ticket
        if self._waiting_by[expert] >= self._max_waiting:
            raise OverCapacity(
                f"expert {expert!r} has {self._waiting_by[expert]} requests waiting, "
                f"and no more than {self._max_waiting} may"
            )
        self._waiting[ticket] = None
        self._waiting_by[expert] += 1
        return ticket

    def grant(self, ready: set[str]) -> list[Ticket]:
        """The tickets that may run now, oldest first. They count as running from here on."""
        granted: list[Ticket] = []
        for ticket in self._waiting:
            if self._running + len(granted) >= self.capacity:
                break
            if ticket.expert in ready:
                granted.append(ticket)
        for ticket in granted:
            self._forget(ticket)
            self._run(ticket)
        return granted

    def close(self, ticket: Ticket) -> None:
        """A ticket's request has ended, been given up, or failed: whatever it held is free."""
        if ticket.running:
            ticket.running = False
            self._running -= 1
            self._running_by[ticket.expert] -= 1
        elif ticket in self._waiting:
            self._forget(ticket)

    def waiting_for(self, expert: str) -> list[Ticket]:
        """Tickets that wait for one expert, oldest first."""
        return [ticket for ticket in self._waiting if ticket.expert == expert]

    def counts(self, expert: str) -> tuple[int, int]:
        """How many wait and how many run for one expert."""
        return self._waiting_by[expert], self._running_by[expert]

    @property
    def total(self) -> int:
        """All tickets, waiting and running."""
        return len(self._waiting) + self._running

    def _run(self, ticket: Ticket) -> None:
        ticket.running = True
        self._running += 1
        self._running_by[ticket.expert] += 1

    def _forget(self, ticket: Ticket) -> None:
        del self._waiting[ticket]
        self._waiting_by[ticket.expert] -= 1
