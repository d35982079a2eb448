"""What a gateway counts of each request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.telemetry import table
from service.telemetry.exposition import text_of
from service.telemetry.meter import Meter

# Refused although somebody was asked: there was no room anywhere.
_NO_ROOM = frozenset({"over_capacity"})


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, one way or another. Times in s from its arrival; 0: never.

    `fault`: the error's code, or empty. `local`: a pool answered, and so `queue_s`,
    `engine_s` (until the engine's first byte) and `predicted_s` (the wait) are known.
    `failed`: the attempts that did before the first byte, as (expert, code).
    """

    expert: str
    category: str
    recipe: str
    outcome: str
    fault: str
    attempts: int
    streamed: bool
    local: bool
    first_byte_s: float
    total_s: float
    queue_s: float = 0.0
    engine_s: float = 0.0
    predicted_s: float = 0.0
    failed: Sequence[tuple[str, str]] = ()


class GatewayMetrics:
    """The meter of a gateway, and what one request adds to it."""

    def __init__(self) -> None:
        self.meter = Meter(table.Side.GATEWAY)
        self._in_flight = 0
        self.meter.on_read(lambda: self.meter.put(table.IN_FLIGHT, self._in_flight))

    @property
    def in_flight(self) -> int:
        """Requests in this gateway now."""
        return self._in_flight

    def began(self) -> None:
        """A request has come; `ended` must follow."""
        self._in_flight += 1

    def routed(self, route_s: float) -> None:
        """It was understood, and who shall answer is known."""
        self.meter.observe(table.ROUTE, route_s)

    def ended(self, one: Ended) -> None:
        """It has ended."""
        self._in_flight -= 1
        meter = self.meter
        meter.add(table.REQUESTS, 1, one.expert, one.category, one.recipe, one.outcome)
        for expert, code in one.failed:
            meter.add(table.FAILED_ATTEMPTS, 1, expert, code)
        if one.fault and (one.attempts == 0 or one.fault in _NO_ROOM):
            meter.add(table.REJECTIONS, 1, one.fault)
        if one.outcome != "ok" or not one.first_byte_s:
            return
        meter.observe(table.TOTAL, one.total_s, one.expert)
        if one.streamed:
            meter.observe(table.FIRST_TOKEN, one.first_byte_s, one.expert)
        if not one.local:
            return
        meter.observe(table.OVERHEAD, max(0.0, one.first_byte_s - one.queue_s - one.engine_s))
        meter.observe(table.WAIT_ERROR, one.queue_s - one.predicted_s)
        meter.add(table.WAIT_PREDICTED, one.predicted_s, one.expert)
        meter.add(table.WAIT_REAL, one.queue_s, one.expert)

    async def text(self, labels: Mapping[str, str]) -> str:
        """Everything as Prometheus' text, every sample with these labels."""
        self.meter.refresh()
        return await asyncio.to_thread(text_of, [(self.meter.registry, labels)])
