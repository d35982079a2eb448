"""What a gateway's circuit breakers make of attempts, and which places they close.

Counted against an expert is what it did itself: its engine or its endpoint could not be
reached, died, answered with nonsense, or said nothing although it had time. Nothing is
counted for an error of the client's, a full or draining pool, a rate limit of the
endpoint, a client that left, or a deadline too short to judge by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from random import random

from service.broker.breaker import Breakers, RetryBudget, State, backoff_s
from service.broker.pool_state import REMOTE
from service.errors import (
    CircuitOpenError,
    CoeError,
    DeadlineExceededError,
    EngineDeadError,
    PoolUnavailableError,
    UpstreamError,
)
from service.telemetry import metrics
from service.telemetry.registry import MetricsRegistry

_OWN = (EngineDeadError, PoolUnavailableError)

Place = tuple[str, str]


class CircuitBreakers:
    """The breakers of one gateway. A place is (expert, pool's boot id) or (expert, REMOTE).

    `endpoints`: the address of each remote expert; experts with the same one share a breaker
    for it, which only failures to reach it open. `min_hang_s`: time in which an attempt must have
    said something. `breakers` and `budget`, that of retries, outlive a config.
    """

    def __init__(
        self,
        endpoints: Mapping[str, str],
        min_hang_s: float,
        breakers: Breakers[Place],
        budget: RetryBudget,
        meter: MetricsRegistry,
    ) -> None:
        self._endpoints = endpoints
        self._hang_s = min_hang_s
        self._breakers = breakers
        self._budget = budget
        self._meter = meter

    def blocked(self) -> frozenset[Place]:
        """Places where nobody is to be asked now."""
        shut = self._breakers.blocked(time.monotonic())
        if not shut:
            return shut
        named = {(expert, REMOTE) for expert, url in self._endpoints.items() if ("", url) in shut}
        return shut | named

    def refusal(self, experts: Collection[str]) -> CircuitOpenError:
        """The error where only closed places are left: with the time until one is tried."""
        now_s = time.monotonic()
        keys = [key for key in self.blocked() if key[0] in experts]
        keys += [("", self._endpoints[name]) for name in experts if name in self._endpoints]
        left_s = self._breakers.left_s(keys, now_s)
        name = next(iter(experts), "")
        return CircuitOpenError(
            f"expert {name!r} has failed several times in a row and is left alone for a moment",
            retry_after_s=max(1.0, left_s),
        )

    def record_request(self) -> None:
        """A request has come: it earns its share of a retry."""
        self._budget.earn()

    def pay_for_retry(self) -> bool:
        """Whether the retry budget has another attempt left; then it is paid for."""
        made = self._budget.spend()
        self._meter.add(metrics.RETRIES, 1, "made" if made else "refused")
        return made

    async def retry_delay_s(self, times_tried: int) -> None:
        """Before going back to a place that has just failed."""
        await asyncio.sleep(backoff_s(times_tried, random))

    @contextmanager
    def attempt(self, expert: str, boot: str, given_s: float) -> Iterator[None]:
        """One attempt at a place, with `given_s` of time: how it ends is noted."""
        began_s = time.monotonic()
        keys: list[Place] = [(expert, boot)]
        if boot == REMOTE:
            keys.append(("", self._endpoints.get(expert, "")))
        tries = [self._breakers.begin(key, began_s) for key in keys]
        ok: bool | None = None
        reached: bool | None = None
        try:
            yield
            ok = reached = True
        except CoeError as error:
            ok = self._classify_outcome(error, given_s)
            if isinstance(error, UpstreamError):
                # Any status of its own says that it is there.
                reached = not error.unreachable
            raise
        finally:
            now_s = time.monotonic()
            ends = (ok, reached)
            for key, one, end in zip(keys, tries, ends, strict=False):
                if self._breakers.end(key, one, end, now_s):
                    self._meter.add(metrics.BREAKER_TRIPS, 1, expert)

    def _classify_outcome(self, error: CoeError, given_s: float) -> bool | None:
        if isinstance(error, DeadlineExceededError):
            return False if given_s >= self._hang_s and error.silent else None
        if isinstance(error, UpstreamError):
            return None if error.limited else False
        return False if isinstance(error, _OWN) else None

    def forget_all_but(self, boots: Collection[str]) -> None:
        """Pools that are gone do not come back."""
        self._breakers.forget(lambda key: key[0] != "" and key[1] not in (*boots, REMOTE))

    def read(self) -> None:
        """Tell metrics which experts have an open breaker."""
        self._meter.forget(metrics.BREAKER_OPEN)
        for (expert, _), state in self._breakers.states(time.monotonic()).items():
            if expert:
                before = self._meter.value(metrics.BREAKER_OPEN, expert)
                shut = max(before, float(state is not State.CLOSED))
                self._meter.put(metrics.BREAKER_OPEN, shut, expert)
