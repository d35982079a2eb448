"""The load of a pool, by which Ray Serve's autoscaling adds and removes replicas. Pure.

`LoadMeter` measures arrivals, service times and tokens with exponential averages. `pool_load` puts
them together with the queues. `service.broker.autoscaling` adds the loads of all replicas up, so
every part is a quantity that may be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.pool.request_queue import Backlog

# Mean age of the arrivals and tokens that a rate is computed from.
_RATE_S = 5.0
_EWMA = 0.2
# A rate below this counts as none.
_LEAST_RATE = 1e-3


class DecayingRate:
    """Events per second, as an exponential average over about 5 s."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._at_s = 0.0

    def add(self, amount: float, now_s: float) -> None:
        """Count events."""
        self._sum = self._sum * self._decay(now_s) + amount
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        """Return the rate."""
        rate = self._sum * self._decay(now_s) / _RATE_S
        return rate if rate >= _LEAST_RATE else 0.0

    def _decay(self, now_s: float) -> float:
        return math.exp(-max(0.0, now_s - self._at_s) / _RATE_S)


class DecayingLevel:
    """The level of a quantity, as an exponential average over about 5 s."""

    def __init__(self) -> None:
        self._level = 0.0
        self._mean = 0.0
        self._at_s = 0.0

    def add(self, change: float, now_s: float) -> None:
        """Change the level."""
        self._mean, self._at_s = self.mean(now_s), now_s
        self._level += change

    def mean(self, now_s: float) -> float:
        """Return the average."""
        kept = math.exp(-max(0.0, now_s - self._at_s) / _RATE_S)
        mean = self._level + (self._mean - self._level) * kept
        return mean if mean >= _LEAST_RATE else 0.0


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """The load of one pool. `service.broker.autoscaling` tells what the parts mean.

    Attributes:
        ongoing: Running and waiting requests.
        tokens_per_s: Completion tokens per second.
        offered: Engines that each expert's arriving requests keep busy.
        backlog_s: Seconds in which one engine would serve each expert's waiting requests.
        serving: Whether an engine runs.
        start_s: Seconds that an engine takes to start.
    """

    ongoing: float = 0.0
    tokens_per_s: float = 0.0
    offered: Mapping[str, float] = field(default_factory=dict)
    backlog_s: Mapping[str, float] = field(default_factory=dict)
    serving: bool = False
    start_s: float = 0.0


@dataclass(slots=True)
class _ExpertMeter:
    """Arrivals, running places and mean service time of one expert."""

    arrivals: DecayingRate = field(default_factory=DecayingRate)
    running: DecayingLevel = field(default_factory=DecayingLevel)
    service_s: float | None = None


class LoadMeter:
    """Measures the calls of a pool.

    Args:
        clock: The current time in s.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._experts: dict[str, _ExpertMeter] = {}
        self._tokens = DecayingRate()

    def record_arrival(self, expert: str, places: int) -> None:
        """Count a new request that will take so many places of an engine."""
        self._of(expert).arrivals.add(places, self._clock())

    def record_tokens(self, tokens: int) -> None:
        """Count completion tokens."""
        self._tokens.add(tokens, self._clock())

    @contextmanager
    def run(self, expert: str, places: int) -> Iterator[None]:
        """Time a request while an engine works on it in so many places."""
        meter, began_s = self._of(expert), self._clock()
        meter.running.add(places, began_s)
        try:
            yield
        finally:
            now_s = self._clock()
            meter.running.add(-places, now_s)
            took_s = now_s - began_s
            if meter.service_s is None:
                meter.service_s = took_s
            else:
                meter.service_s += _EWMA * (took_s - meter.service_s)

    def forget(self, expert: str) -> None:
        """Drop the measurements of an expert that was removed."""
        self._experts.pop(expert, None)

    def service_s(self, expert: str) -> float | None:
        """Return the mean seconds that an engine works on a request; None before any has ended."""
        return self._of(expert).service_s

    def busy_places(self, expert: str) -> float:
        """Return the places that arriving requests keep busy, however many there are.

        It is arrivals per second × seconds of service (Little's law). Requests that take much
        longer than earlier ones show in the places that run.
        """
        meter, now_s = self._of(expert), self._clock()
        arriving = meter.arrivals.per_s(now_s) * (meter.service_s or 0.0)
        return max(arriving, meter.running.mean(now_s))

    def tokens_per_s(self) -> float:
        """Return the completion tokens per second of all experts."""
        return self._tokens.per_s(self._clock())

    def _of(self, expert: str) -> _ExpertMeter:
        return self._experts.setdefault(expert, _ExpertMeter())


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """One slot: its experts' queues, and its engine.

    Attributes:
        capacity: Places of the engine.
        backlogs: What runs and waits, by expert.
        serving: Whether the engine runs.
        start_s: Seconds that the engine takes to start.
    """

    capacity: int
    backlogs: Mapping[str, Backlog]
    serving: bool
    start_s: float


def pool_load(slots: Iterable[SlotLoad], meter: LoadMeter, now_s: float) -> PoolLoad:
    """Return the load of a pool. Experts without any are left out."""
    slots = list(slots)
    ongoing = 0.0
    offered: dict[str, float] = {}
    backlog_s: dict[str, float] = {}
    for slot in slots:
        for expert, queue in slot.backlogs.items():
            ongoing += queue.running + queue.waiting_load
            offered[expert] = meter.busy_places(expert) / slot.capacity
            work_s = queue.waiting * (meter.service_s(expert) or 0.0) / slot.capacity
            # While an engine starts, its requests wait for that. Other replicas would not help.
            if slot.serving and queue.oldest_s is not None:
                work_s = max(work_s, now_s - queue.oldest_s)
            backlog_s[expert] = work_s
    return PoolLoad(
        ongoing=ongoing,
        tokens_per_s=meter.tokens_per_s(),
        offered={name: value for name, value in offered.items() if value},
        backlog_s={name: value for name, value in backlog_s.items() if value},
        serving=any(slot.serving for slot in slots),
        start_s=max((slot.start_s for slot in slots), default=0.0),
    )
