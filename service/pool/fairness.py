"""Whose turn it is among tenants: by tokens served, weights, and priority classes. Pure.

A virtual token counter per tenant (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024): who waits and has been served least, per weight, is next. Who was
away does not collect credit: coming back, a tenant starts where the least served of
those present stand. Classes go before it, high first; but a class that waits and was
passed over `STARVE` times is next, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Collection

from service.types import Tenant

CLASSES = {"high": 0, "normal": 1, "low": 2}
STARVE = 8
_MOST_KNOWN = 4096


class Fairness:
    """Counters of one slot's tenants, in tokens per weight."""

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._floor = 0.0
        self._passed: dict[int, int] = {}
        self._chosen: dict[str, int] = {}
        self._turns = 0

    def arrived(self, tenant: Tenant, present: Collection[str]) -> None:
        """A tenant asks; `present`: the others that wait or run, by name."""
        if tenant.name in present:
            return
        others = [self._counters.get(name, self._floor) for name in present]
        least = min(others, default=self._floor)
        if len(self._counters) >= _MOST_KNOWN:
            self._counters = {n: c for n, c in self._counters.items() if n in present}
            self._chosen = {n: t for n, t in self._chosen.items() if n in present}
        self._counters[tenant.name] = max(least, self._counters.get(tenant.name, least))

    def choose(self, waiting: Collection[tuple[int, str]]) -> tuple[int, str]:
        """Of those that wait, as (class, tenant), the next to be served. Never of none."""
        classes = {one for one, _ in waiting}
        chosen = min(classes)
        overdue = max(classes, key=lambda one: self._passed.get(one, 0))
        if self._passed.get(overdue, 0) >= STARVE:
            chosen = overdue
        self._passed = {one: self._passed.get(one, 0) + 1 for one in classes if one != chosen}
        return min(
            (one for one in waiting if one[0] == chosen),
            # Of those alike, who was chosen longest ago.
            key=lambda one: (
                self._counters.get(one[1], self._floor),
                self._chosen.get(one[1], 0),
                one[1],
            ),
        )

    def started(self, tenant: Tenant, tokens: float) -> None:
        """A tenant's request runs, with a prompt of so many tokens."""
        self._turns += 1
        self._chosen[tenant.name] = self._turns
        self.served(tenant, tokens)

    def served(self, tenant: Tenant, tokens: float) -> None:
        """A tenant has been given service worth so many tokens."""
        before = self._counters.get(tenant.name, self._floor)
        self._floor = max(self._floor, before)
        self._counters[tenant.name] = before + tokens / tenant.weight
