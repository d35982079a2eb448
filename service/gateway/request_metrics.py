"""The gateway's metrics of each request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from service.gateway.request_record import RequestRecord
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from service.telemetry.prometheus_exposition import text_of

# Codes of rejections although an expert was called: no pool had room.
_NO_ROOM = frozenset({"over_capacity"})


class GatewayMetrics:
    """The registry of a gateway, and what one request adds to it.

    `remote`: the experts that no pool counts. Requests that began by an earlier config may be
    answered by such that the config does not have any more.
    """

    def __init__(self) -> None:
        self.registry = MetricsRegistry(Side.GATEWAY)
        self.remote: frozenset[str] = frozenset()
        self._in_flight = 0
        self._refreshers: list[Callable[[], Awaitable[None]]] = []
        self.registry.on_read(
            lambda: self.registry.put(metric_declarations.IN_FLIGHT, self._in_flight)
        )

    def on_read(self, refresh: Callable[[], Awaitable[None]]) -> None:
        """Like the registry's `on_read`, for what must be waited for."""
        self._refreshers.append(refresh)

    @property
    def in_flight(self) -> int:
        """Requests in this gateway now."""
        return self._in_flight

    def request_started(self) -> None:
        """Count a request that has arrived; `request_finished` must follow."""
        self._in_flight += 1

    def request_finished(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self._in_flight -= 1
        registry, recipe = self.registry, record.recipe_label
        registry.add(
            metric_declarations.REQUESTS, 1, record.expert, record.category, recipe, record.outcome
        )
        # A count of 0 is exported as well, so that the share of errors is known from the start.
        registry.add(metric_declarations.SERVER_ERRORS, record.ours, record.expert)
        if record.routed:
            registry.observe(metric_declarations.ROUTE, record.route_ms / 1000)
        for expert, code in record.failed:
            registry.add(metric_declarations.ATTEMPTS_FAILED, 1, expert, code)
        if record.fault and (record.attempts == 0 or record.fault in _NO_ROOM):
            registry.add(metric_declarations.REQUESTS_REJECTED, 1, record.fault)
        if record.session is not None:
            registry.add(metric_declarations.SESSION_TURNS, 1, record.session.decision.value)
        if record.prefix_place is not None:
            registry.add(metric_declarations.PREFIX_TURNS, 1, record.prefix_place)
        if record.escalations:
            registry.add(metric_declarations.ESCALATIONS, record.escalations, recipe)
        self._count_calls(record)
        if record.outcome == "ok" and record.first_byte_s:
            self._observe_times(record)

    def _count_calls(self, record: RequestRecord) -> None:
        registry, recipe = self.registry, record.recipe_label
        if not record.calls:
            return
        registry.add(metric_declarations.COST_PREDICTED, record.predicted_cost, recipe)
        for call in record.calls:
            registry.add(metric_declarations.COST, call.cost, recipe, call.expert)
            if call.reasoning_tokens:
                registry.add(
                    metric_declarations.REASONING_TOKENS, call.reasoning_tokens, call.expert
                )
            if call.expert in self.remote:
                registry.add(
                    metric_declarations.TOKENS, call.prompt_tokens or 0, call.expert, "prompt"
                )
                registry.add(
                    metric_declarations.TOKENS,
                    call.completion_tokens or 0,
                    call.expert,
                    "completion",
                )

    def _observe_times(self, record: RequestRecord) -> None:
        registry, expert = self.registry, record.expert
        registry.observe(metric_declarations.REQUEST_DURATION, record.total_s, expert)
        if record.streamed:
            registry.observe(metric_declarations.TIME_TO_FIRST_TOKEN, record.first_byte_s, expert)
        engine_s = record.prefill_ms / 1000
        if record.local:
            queue_s = record.queue_ms / 1000
            overhead_s = max(0.0, record.first_byte_s - queue_s - engine_s)
            registry.observe(metric_declarations.GATEWAY_OVERHEAD, overhead_s)
            if (predicted_s := record.predicted_wait_s) is not None:
                error_s = queue_s - predicted_s
                direction = "under" if error_s > 0 else "over"
                registry.observe(metric_declarations.WAIT_PREDICTION_ERROR, abs(error_s), direction)
                registry.add(metric_declarations.WAIT_PREDICTED, predicted_s, expert)
                registry.add(metric_declarations.WAIT_ACTUAL, queue_s, expert)
        elif expert in self.remote and record.streamed:
            # A remote engine is known by its bytes alone: only a stream tells its phases apart.
            decode_s = record.total_s - record.first_byte_s
            registry.observe(metric_declarations.PREFILL, engine_s, expert)
            registry.observe(metric_declarations.DECODE, decode_s, expert)
            tokens = (record.calls[-1].completion_tokens or 0) if record.calls else 0
            if tokens > 1:
                registry.observe(
                    metric_declarations.INTER_TOKEN_LATENCY, decode_s / (tokens - 1), expert
                )

    async def text(self, labels: Mapping[str, str]) -> str:
        """Everything as Prometheus' text, every sample with these labels."""
        await asyncio.gather(*(refresh() for refresh in self._refreshers))
        self.registry.refresh()
        return await asyncio.to_thread(text_of, [(self.registry.prometheus, labels)])
