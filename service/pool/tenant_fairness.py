"""The order among tenants, by tokens served, weights and priority classes. Pure.

Each tenant has a virtual token counter (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024). The waiting tenant that got the fewest tokens per weight is next. A tenant
collects no credit while it is away: it starts again at the counter of the least served tenant
present. Priority classes come before these counters, and the highest class is first. A class that
was passed over `STARVE` times is next in any case, so that nobody waits for ever. The lines of
batches take only turns that nobody else wants.
"""

from __future__ import annotations

from collections.abc import Collection

from service.types import BATCH, Tenant

CLASSES = {"high": 0, "normal": 1, "low": 2, BATCH: 3}
STARVE = 8
_MOST_KNOWN = 4096


class Fairness:
    """The counters of one slot's tenants, in tokens per weight."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._floor = 0.0
        self._passed: dict[int, int] = {}
        self._chosen: dict[str, int] = {}
        self._turns = 0

    def arrived(self, tenant: Tenant, present: Collection[str]) -> None:
        """Start to count a tenant. `present` has the names of the tenants that wait or run."""
        if tenant.name in present:
            return
        others = [self._counters.get(name, self._floor) for name in present]
        least = min(others, default=self._floor)
        if len(self._counters) >= _MOST_KNOWN:
            self._counters = {n: c for n, c in self._counters.items() if n in present}
            self._chosen = {n: t for n, t in self._chosen.items() if n in present}
        self._counters[tenant.name] = max(least, self._counters.get(tenant.name, least))

    def choose(self, waiting: Collection[tuple[int, str]]) -> tuple[int, str]:
        """Choose the next (class, tenant) to be served. `waiting` must not be empty."""
        classes = {priority for priority, _ in waiting}
        chosen = min(classes)
        people = classes - {CLASSES[BATCH]} or classes
        overdue = max(people, key=lambda priority: self._passed.get(priority, 0))
        if self._passed.get(overdue, 0) >= STARVE:
            chosen = overdue
        self._passed = {
            priority: self._passed.get(priority, 0) + 1
            for priority in classes
            if priority != chosen
        }
        return min(
            (turn for turn in waiting if turn[0] == chosen),
            # A tie goes to the tenant that was chosen longest ago.
            key=lambda turn: (
                self._counters.get(turn[1], self._floor),
                self._chosen.get(turn[1], 0),
                turn[1],
            ),
        )

    def started(self, tenant: Tenant, tokens: float) -> None:
        """Add the prompt tokens of a request that starts to run."""
        self._turns += 1
        self._chosen[tenant.name] = self._turns
        self.served(tenant, tokens)

    def served(self, tenant: Tenant, tokens: float) -> None:
        """Add tokens to a tenant's counter, divided by its weight."""
        before = self._counters.get(tenant.name, self._floor)
        self._floor = max(self._floor, before)
        self._counters[tenant.name] = before + tokens / tenant.weight
