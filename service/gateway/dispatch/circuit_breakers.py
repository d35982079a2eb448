"""The gateway's circuit breakers and its retry budget.

A breaker counts failures of the expert itself: its engine or endpoint could not be reached, died,
sent an invalid answer, or sent nothing although it had enough time. An error that comes as an event
of a stream counts like one that comes as a status. It does not count errors of the client, a full
or draining pool, a rate limit of the endpoint, a client that left, or a deadline that was too short
for a verdict.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from random import random
from typing import Any

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
# Codes of faults of a pool or its engine that a stream may end with.
_OWN_CODES = frozenset(kind.code for own in _OWN for kind in (own, *own.__subclasses__()))
# Codes and types, in OpenAI's and Anthropic's words, of errors that are not the expert's fault.
_NOT_ITS_FAULT = frozenset(
    {"rate_limit_exceeded", "rate_limit_error", "overloaded_error", "insufficient_quota"}
    | {"invalid_request_error", "BadRequestError", "invalid_prompt", "content_filter"}
    | {"context_length_exceeded", "request_too_large", "authentication_error", "permission_error"}
    | {"not_found_error", "billing_error"}
)
_OVERLOADED = 529


def stream_verdict(error: Mapping[str, Any], *, local: bool) -> bool | None:
    """The verdict on an expert whose stream ended with an error event, as of `attempt`.

    Args:
        error: The error in the event: `code`, `type` and `message` in the words of any API.
        local: Whether a pool sent it, rather than a remote endpoint.

    Returns:
        False for the expert's own failure; None where the event says nothing of the expert.
    """
    code = error.get("code")
    if isinstance(code, int) and not isinstance(code, bool):
        return False if code >= 500 and code != _OVERLOADED else None
    if local:
        return False if code in _OWN_CODES else None
    words = {word for word in (code, error.get("type")) if isinstance(word, str)}
    return None if words & _NOT_ITS_FAULT else False


@dataclass(slots=True)
class Attempt:
    """One attempt at a place.

    Attributes:
        local: Whether the place is a pool.
        verdict: The verdict of an attempt that ends without an exception.
    """

    local: bool
    verdict: bool | None = True

    def record_stream_error(self, error: Mapping[str, Any]) -> None:
        """Record that the answer ended with this error event."""
        self.verdict = stream_verdict(error, local=self.local)


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
    def attempt(self, expert: str, boot: BootId, given_s: float) -> Iterator[Attempt]:
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
        attempt = Attempt(local=boot is not REMOTE)
        try:
            yield attempt
            ok, reached = attempt.verdict, True
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
