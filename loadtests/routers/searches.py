"""Which load to try next, and what the tried ones say. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRST_IN_FLIGHT = 16
MOST_IN_FLIGHT = 1024
MOST_P99_MS = 1000.0
MOST_ERRORS = 0.001
# Twice the requests in flight that bring less than this are not worth their wait.
_GAIN = 1.05
_PATIENCE = 2


@dataclass(frozen=True, slots=True)
class Load:
    """One closed loop.

    Attributes:
        in_flight: Requests under way at all times.
        replies_per_s: Good replies only.
        p99_ms: 99th percentile of the good replies' times.
        errors: The share of replies that were not good.
        busy_ms: Processor time of the gateway for each good reply.
    """

    in_flight: int
    replies_per_s: float
    p99_ms: float
    errors: float
    busy_ms: float = 0.0

    @property
    def within(self) -> bool:
        """Whether the reply times and errors are within bounds."""
        return self.errors < MOST_ERRORS and self.p99_ms < MOST_P99_MS


def next_in_flight(tried: Sequence[Load]) -> int | None:
    """The number to try after these, in their order; None if none would help.

    It doubles until two in a row have brought no more, or the bounds are left. Where the first one
    is already too many, it halves until the bounds are kept.
    """
    if not tried:
        return FIRST_IN_FLIGHT
    last = tried[-1]
    if not any(load.within for load in tried):
        return last.in_flight // 2 or None
    if not last.within or last.in_flight < FIRST_IN_FLIGHT or last.in_flight >= MOST_IN_FLIGHT:
        return None
    useless = 0
    best = 0.0
    for load in tried:
        useless = 0 if load.replies_per_s >= _GAIN * best else useless + 1
        best = max(best, load.replies_per_s)
    return None if useless >= _PATIENCE else 2 * last.in_flight


def best_load(tried: Sequence[Load]) -> Load | None:
    """The one with the most replies per second within bounds; None if none is."""
    within = [load for load in tried if load.within]
    return max(within, key=lambda load: load.replies_per_s, default=None)


def next_level(levels: Sequence[int], passed: Mapping[int, bool]) -> int | None:
    """The level to try next by bisection; None once the largest that passes is known.

    Args:
        levels: From small to large. Where one fails, larger ones are taken to fail.
        passed: What was tried.
    """
    low = max((i for i, level in enumerate(levels) if passed.get(level) is True), default=-1)
    failed = (i for i, level in enumerate(levels) if passed.get(level) is False)
    high = min((i for i in failed if i > low), default=len(levels))
    return levels[(low + high) // 2] if high - low > 1 else None


def largest_passed(passed: Mapping[int, bool]) -> int:
    """The largest level that passes; 0 if none does."""
    return max((level for level, good in passed.items() if good), default=0)
