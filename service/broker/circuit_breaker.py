"""Circuit breakers and the retry budget. Pure: clock and randomness come as arguments.

A breaker stands for one way of getting an answer: an expert in one pool, a remote
expert, or a remote endpoint. It opens after failures in a row that are that one's own; what
a client did wrong, a full queue or a client that left say nothing of it. Open, it lets nothing
through for a while, then one request as a probe: its success closes the breaker, its failure
opens it for twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Random = Callable[[], float]


class State(StrEnum):
    """State of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long.

    failures: events in a row; faults within `together_s` are one event, because one cause
    ends everything that was under way. Open for open_duration_s, then twice that, at most
    max_open_duration_s; up to a fifth longer at random, so that gateways do not probe together.
    """

    failures: int = 5
    open_duration_s: float = 2.0
    max_open_duration_s: float = 60.0
    together_s: float = 0.25


@dataclass(frozen=True, slots=True)
class Permit:
    """Permission for one request. `turn`: how often the state had changed before."""

    turn: int
    probe: bool


class Breaker:
    """One circuit breaker. Times are seconds of a monotonic clock."""

    def __init__(self, policy: BreakerPolicy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._turn = 0
        self._row = 0
        self._last_s = float("-inf")
        self._opened_row = 0
        self._until_s: float | None = None
        self._probing = False

    def state(self, now_s: float) -> State:
        """The state now."""
        if self._until_s is None:
            return State.CLOSED
        return State.OPEN if now_s < self._until_s else State.HALF_OPEN

    def allows(self, now_s: float) -> bool:
        """Whether a request may pass now."""
        state = self.state(now_s)
        return state is State.CLOSED or (state is State.HALF_OPEN and not self._probing)

    def left_s(self, now_s: float) -> float:
        """Seconds until a request may pass; 0 where one may now."""
        if self.allows(now_s):
            return 0.0
        assert self._until_s is not None
        return max(self._until_s - now_s, self._policy.together_s)

    def begin(self, now_s: float) -> Permit:
        """Let a request pass, after `allows`; each needs one call of `end`."""
        probe = self.state(now_s) is State.HALF_OPEN
        if probe:
            self._probing = True
        return Permit(self._turn, probe)

    def end(self, permit: Permit, ok: bool | None, now_s: float) -> bool:
        """Record the end of a request.

        Args:
            permit: The request's permit.
            ok: True: success. False: the expert failed. None: neither.
            now_s: The time, in s.

        Returns:
            Whether this opened the breaker.
        """
        if permit.turn != self._turn:
            return False  # it began before the last change of state
        if permit.probe:
            self._probing = False
        if ok is None:
            return False
        if ok:
            self._row = 0
            if permit.probe:
                self._turn += 1
                self._until_s = None
                self._opened_row = 0
            return False
        if permit.probe:
            self._open(now_s)
            return True
        if now_s - self._last_s >= self._policy.together_s:
            self._row += 1
        self._last_s = now_s
        if self._row < self._policy.failures:
            return False
        self._open(now_s)
        return True

    def _open(self, now_s: float) -> None:
        policy = self._policy
        span_s = min(
            policy.open_duration_s * 2.0 ** min(self._opened_row, 30), policy.max_open_duration_s
        )
        self._opened_row += 1
        self._turn += 1
        self._row = 0
        self._probing = False
        self._until_s = now_s + span_s * (1 + 0.2 * self._random())


Key = TypeVar("Key", bound=Hashable)


class Breakers(Generic[Key]):
    """The breakers of one gateway; each is created by its first failure."""

    def __init__(self, policy: BreakerPolicy, random: Random) -> None:
        self._policy = policy
        self._random = random
        self._all: dict[Key, Breaker] = {}

    def blocked(self, now_s: float) -> frozenset[Key]:
        """Keys of the breakers that let no request pass now."""
        if not self._all:
            return frozenset()
        return frozenset(key for key, breaker in self._all.items() if not breaker.allows(now_s))

    def left_s(self, keys: Iterable[Key], now_s: float) -> float:
        """Seconds until the first of these lets a request pass."""
        found = [self._all[key].left_s(now_s) for key in keys if key in self._all]
        return min(found, default=0.0)

    def begin(self, key: Key, now_s: float) -> Permit:
        """Let a request pass; see `Breaker.begin`."""
        breaker = self._all.get(key)
        return breaker.begin(now_s) if breaker is not None else Permit(0, probe=False)

    def end(self, key: Key, permit: Permit, ok: bool | None, now_s: float) -> bool:
        """Record an outcome; see `Breaker.end`."""
        breaker = self._all.get(key)
        if breaker is None:
            if ok is not False:
                return False
            breaker = self._all[key] = Breaker(self._policy, self._random)
        return breaker.end(permit, ok, now_s)

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Delete the breakers of the keys that are gone."""
        for key in [key for key in self._all if gone(key)]:
            del self._all[key]

    def states(self, now_s: float) -> dict[Key, State]:
        """State of every breaker that has recorded a failure."""
        return {key: breaker.state(now_s) for key, breaker in self._all.items()}


class RetryBudget:
    """Bounds retries to a share of all requests, plus a reserve.

    It keeps retries from doubling the load when everything fails.
    """

    def __init__(self, share: float, reserve: float) -> None:
        self._share = share
        self._most = reserve
        self._left = reserve

    def earn(self) -> None:
        """Add the share of one request."""
        self._left = min(self._most, self._left + self._share)

    def spend(self) -> bool:
        """Take one retry out of the budget; whether it was allowed."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


def backoff_s(attempt: int, random: Random, *, base_s: float = 0.05, most_s: float = 1.0) -> float:
    """Return the delay before an expert that has just failed is tried again, in s.

    It grows exponentially, with full jitter, so that requests that one fault has hit do not
    return together.
    """
    return float(random() * min(most_s, base_s * 2.0 ** min(attempt, 30)))
