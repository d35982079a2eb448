"""What a gateway counts of each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from service.telemetry import metrics
from service.telemetry.exposition import text_of
from service.telemetry.metric_types import Side
from service.telemetry.registry import MetricsRegistry

# Refused although somebody was asked: there was no room anywhere.
_NO_ROOM = frozenset({"over_capacity"})


@dataclass(frozen=True, slots=True)
class ActiveCall:
    """One call of an expert: its tokens, as far as they were told, and its units of cost."""

    expert: str
    prompt_tokens: int
    answer_tokens: int
    cost: float


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A request that has ended, one way or another. Times in s from its arrival; 0: never.

    `tenant` is empty where it was not known yet. `fault`: the error's code, or empty.
    `ours`: it ended by our fault. `local`: a pool answered, and so `queue_s` and
    `predicted_s` (the wait) are known. `engine_s`: until the engine's first byte.
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
    predicted_cost: float = 0.0
    escalations: int = 0
    ours: bool = False
    failed: Sequence[tuple[str, str]] = ()
    calls: Sequence[ActiveCall] = ()


class GatewayMetrics:
    """The meter of a gateway, and what one request adds to it.

    `remote`: the experts that no pool counts. Requests that began by an earlier config may be
    answered by such that the config does not have any more.
    """

    def __init__(self) -> None:
        self.meter = MetricsRegistry(Side.GATEWAY)
        self.remote: frozenset[str] = frozenset()
        self._in_flight = 0
        self._asked: list[Callable[[], Awaitable[None]]] = []
        self.meter.on_read(lambda: self.meter.put(metrics.IN_FLIGHT, self._in_flight))

    def on_ask(self, asked: Callable[[], Awaitable[None]]) -> None:
        """Like the meter's `on_read`, for what must be waited for."""
        self._asked.append(asked)

    @property
    def in_flight(self) -> int:
        """Requests in this gateway now."""
        return self._in_flight

    def began(self) -> None:
        """A request has come; `ended` must follow."""
        self._in_flight += 1

    def routed(self, route_s: float) -> None:
        """It was understood, and who may answer is known."""
        self.meter.observe(metrics.ROUTE, route_s)

    def ended(self, one: RequestSummary) -> None:
        """It has ended."""
        self._in_flight -= 1
        meter = self.meter
        meter.add(metrics.REQUESTS, 1, one.expert, one.category, one.recipe, one.outcome)
        # 0 as well, so that a share of errors can be told before there are any.
        meter.add(metrics.SERVER_ERRORS, one.ours, one.expert)
        for expert, code in one.failed:
            meter.add(metrics.ATTEMPTS_FAILED, 1, expert, code)
        if one.fault and (one.attempts == 0 or one.fault in _NO_ROOM):
            meter.add(metrics.REQUESTS_REJECTED, 1, one.fault)
        if one.escalations:
            meter.add(metrics.ESCALATIONS, one.escalations, one.recipe)
        self._bill(one)
        if one.outcome != "ok" or not one.first_byte_s:
            return
        meter.observe(metrics.REQUEST_DURATION, one.total_s, one.expert)
        if one.streamed:
            meter.observe(metrics.TIME_TO_FIRST_TOKEN, one.first_byte_s, one.expert)
        if not one.local:
            if one.expert in self.remote:
                self._remote_times(one)
            return
        meter.observe(
            metrics.GATEWAY_OVERHEAD, max(0.0, one.first_byte_s - one.queue_s - one.engine_s)
        )
        meter.observe(metrics.WAIT_PREDICTION_ERROR, one.queue_s - one.predicted_s)
        meter.add(metrics.WAIT_PREDICTED, one.predicted_s, one.expert)
        meter.add(metrics.WAIT_ACTUAL, one.queue_s, one.expert)

    def _bill(self, one: RequestSummary) -> None:
        """What its calls used."""
        meter = self.meter
        if not one.calls:
            return
        meter.add(metrics.COST_PREDICTED, one.predicted_cost, one.recipe)
        for call in one.calls:
            meter.add(metrics.COST, call.cost, one.recipe, call.expert)
            if call.expert in self.remote:
                meter.add(metrics.TOKENS, call.prompt_tokens, call.expert, "prompt")
                meter.add(metrics.TOKENS, call.answer_tokens, call.expert, "completion")

    def _remote_times(self, one: RequestSummary) -> None:
        """A remote expert's engine is known by its bytes alone: only a stream tells them apart."""
        if not one.streamed:
            return
        meter, decode_s = self.meter, one.total_s - one.first_byte_s
        meter.observe(metrics.PREFILL, one.engine_s, one.expert)
        meter.observe(metrics.DECODE, decode_s, one.expert)
        tokens = one.calls[-1].answer_tokens if one.calls else 0
        if tokens > 1:
            meter.observe(metrics.INTER_TOKEN_LATENCY, decode_s / (tokens - 1), one.expert)

    async def text(self, labels: Mapping[str, str]) -> str:
        """Everything as Prometheus' text, every sample with these labels."""
        await asyncio.gather(*(asked() for asked in self._asked))
        self.meter.refresh()
        return await asyncio.to_thread(text_of, [(self.meter.registry, labels)])
