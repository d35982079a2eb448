"""The gateway's circuit breakers and its retry budget.

A breaker counts failures of the expert itself: its engine or endpoint could not be reached, died,
sent an invalid answer, or sent nothing although it had enough time. It does not count errors of the
client, a full or draining pool, a rate limit of the endpoint, a client that left, or a deadline
that was too short for a verdict.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import random

from service.broker.circuit_breaker import Breakers, RetryBudget, State, backoff_s
from service.broker.pool_state import REMOTE, BootId, Place
from service.errors import (
    CircuitOpenError,
    CoeError,
    DeadlineExceededError,
    EngineDeadError,
    PoolUnavailableError,
    UpstreamError,
)
from service.telemetry import metric_declarations
from service.telemetry.metrics_registry import MetricsRegistry

_OWN = (EngineDeadError, PoolUnavailableError)


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """The key of the breaker that the remote experts of one URL share."""

    url: str


BreakerKey = Place | RemoteUrl


class CircuitBreakers:
    """The breakers of one gateway. A place is (expert, pool's boot id) or (expert, REMOTE).

    Args:
        endpoints: The URL of each remote expert. Experts with the same URL share a further breaker
            for it, which opens only if the URL can't be reached.
        min_hang_s: A silent attempt counts as a failure if it had at least this many seconds.
        breakers: The state of each breaker. It outlives a config.
        budget: The retry budget. It outlives a config.
        registry: Counts trips and retries.
    """

    def __init__(
        self,
        endpoints: Mapping[str, str],
        min_hang_s: float,
        breakers: Breakers[BreakerKey],
        budget: RetryBudget,
        registry: MetricsRegistry,
    ) -> None:
        self._endpoints = endpoints
        self._min_hang_s = min_hang_s
        self._breakers = breakers
        self._budget = budget
        self._registry = registry

    def blocked(self) -> frozenset[Place]:
        """The places whose breaker is open."""
        blocked = self._breakers.blocked(time.monotonic())
        places = {key for key in blocked if not isinstance(key, RemoteUrl)}
        urls = {key.url for key in blocked if isinstance(key, RemoteUrl)}
        places |= {(expert, REMOTE) for expert, url in self._endpoints.items() if url in urls}
        return frozenset(places)

    def refusal(self, experts: Collection[str]) -> CircuitOpenError:
        """Return the error for blocked experts, with the time until the next trial."""
        now_s = time.monotonic()
        keys: list[BreakerKey] = [key for key in self.blocked() if key[0] in experts]
        keys += [RemoteUrl(self._endpoints[name]) for name in experts if name in self._endpoints]
        left_s = self._breakers.left_s(keys, now_s)
        name = next(iter(experts), "")
        return CircuitOpenError(
            f"expert {name!r} has failed several times in a row; its circuit breaker is open",
            retry_after_s=max(1.0, left_s),
        )

    def record_request(self) -> None:
        """Count a request. Each request adds a fraction of a retry to the budget."""
        self._budget.earn()

    def pay_for_retry(self) -> bool:
        """Take one retry from the budget; False if the budget is empty."""
        paid = self._budget.spend()
        self._registry.add(metric_declarations.RETRIES, 1, "made" if paid else "refused")
        return paid

    async def wait_before_retry(self, times_tried: int) -> None:
        """Wait before another attempt at a place that has just failed."""
        await asyncio.sleep(backoff_s(times_tried, random))

    @contextmanager
    def attempt(self, expert: str, boot: BootId, given_s: float) -> Iterator[None]:
        """Record the outcome of the attempt that runs inside of this context.

        Args:
            expert: The called expert.
            boot: The boot id of its pool, or REMOTE.
            given_s: The most seconds that the attempt may take.
        """
        began_s = time.monotonic()
        keys: list[BreakerKey] = [(expert, boot)]
        if boot is None and (url := self._endpoints.get(expert)) is not None:
            keys.append(RemoteUrl(url))
        permits = [self._breakers.begin(key, began_s) for key in keys]
        ok: bool | None = None
        reached: bool | None = None
        try:
            yield
            ok = reached = True
        except CoeError as error:
            ok = self._classify_outcome(error, given_s)
            if isinstance(error, UpstreamError):
                # An endpoint that sends a status, even an error, can be reached.
                reached = not error.unreachable
            raise
        finally:
            now_s = time.monotonic()
            ends = (ok, reached)
            for key, permit, end in zip(keys, permits, ends, strict=False):
                if self._breakers.end(key, permit, end, now_s):
                    self._registry.add(metric_declarations.BREAKER_TRIPS, 1, expert)

    def _classify_outcome(self, error: CoeError, given_s: float) -> bool | None:
        if isinstance(error, DeadlineExceededError):
            return False if given_s >= self._min_hang_s and error.silent else None
        if isinstance(error, UpstreamError):
            return None if error.limited else False
        return False if isinstance(error, _OWN) else None

    def forget_all_but(self, boots: Collection[BootId]) -> None:
        """Forget pools that are gone. A restarted pool has another boot id."""
        self._breakers.forget(
            lambda key: not isinstance(key, RemoteUrl) and key[1] not in (*boots, REMOTE)
        )

    def read(self) -> None:
        """Update the metric of experts with an open breaker."""
        self._registry.forget(metric_declarations.BREAKER_OPEN)
        for key, state in self._breakers.states(time.monotonic()).items():
            if not isinstance(key, RemoteUrl):
                expert = key[0]
                before = self._registry.value(metric_declarations.BREAKER_OPEN, expert)
                is_open = max(before, float(state is not State.CLOSED))
                self._registry.put(metric_declarations.BREAKER_OPEN, is_open, expert)
