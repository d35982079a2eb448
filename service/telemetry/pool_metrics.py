"""What a pool process counts: requests as they end, the rest read from the pool when asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from service.config import MoeCapture
from service.engine.base import EngineTimings, RoutingSample
from service.rpc.call import Call, Times
from service.rpc.snapshot import Snapshot
from service.telemetry import metrics
from service.telemetry.exposition import text_of
from service.telemetry.metric_types import Side
from service.telemetry.moe_collector import MoeCollector
from service.telemetry.registry import MetricsRegistry
from service.types import Residency


class PoolStats(Protocol):
    """What is read of a pool."""

    def snapshot(self) -> Snapshot:
        """Its state."""

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Swaps by unit, method and reason."""

    def canary_failures(self) -> int:
        """Swaps that went wrong."""

    def details(self) -> dict[str, dict[str, Any]]:
        """Each expert's residency in full."""


class PoolMetrics:
    """The meter of a pool, and its engines' own metrics.

    It is the pool's watch and its engines'. `traced` is told of calls as well. `capture`: how
    routers are looked at, None: not at all.
    """

    def __init__(self, capture: MoeCapture | None = None) -> None:
        self.meter = MetricsRegistry(Side.POOL)
        self._routes = MoeCollector(capture.every if capture is not None else 0, time.time)
        self.meter.on_read(lambda: self._routes.read(self.meter))
        # Engines' own: a time of creation beside each series would double what is scraped.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.traced: Callable[[Call, Times, str], None] | None = None
        self._weights: dict[str, int] = {}
        self._engines: dict[str, CollectorRegistry] = {}

    def follow(self, pool: PoolStats) -> None:
        """Read this pool's state whenever metrics are read."""
        self.meter.on_read(lambda: self._read(pool))

    def _read(self, pool: PoolStats) -> None:
        put, now = self.meter.put, pool.snapshot()
        # Those that went with a change of the config are nowhere any more.
        for gauge in (
            metrics.REQUESTS_WAITING,
            metrics.REQUESTS_RUNNING,
            metrics.EXPERT_STATE,
            metrics.EXPERT_WEIGHT_BYTES,
        ):
            self.meter.forget(gauge, but=now.experts)
        for expert, queue in now.queues.items():
            put(metrics.REQUESTS_WAITING, queue.waiting, expert)
            put(metrics.REQUESTS_RUNNING, queue.running, expert)
        for expert, state in now.experts.items():
            for possible in Residency:
                put(metrics.EXPERT_STATE, state.state is possible, expert, possible.value)
        for key, count in pool.swap_counts().items():
            self.meter.total(metrics.SWAPS, count, *key)
        self.meter.total(metrics.CANARY_FAILURES, pool.canary_failures())
        for expert, told in pool.details().items():
            size = told.get("host_bytes", self._weights.get(expert))
            if size is not None:
                here = told["state"]
                put(
                    metrics.EXPERT_WEIGHT_BYTES,
                    size if here == Residency.DEVICE else 0,
                    expert,
                    "device",
                )
                put(
                    metrics.EXPERT_WEIGHT_BYTES,
                    size if here == Residency.HOST else 0,
                    expert,
                    "host",
                )

    # --- as the pool's watch

    def ended(self, call: Call, times: Times, fault: str) -> None:
        """See `PoolWatch` of the pool."""
        if self.traced is not None:
            self.traced(call, times, fault)
        if times.began_s:
            self.meter.observe(metrics.QUEUE, times.queue_s, call.expert)
            self.meter.observe(metrics.SWAP_WAIT, times.swap_s, call.expert)

    # --- as its engines' watch

    def on_finished(self, work: EngineTimings) -> None:
        """See `EngineWatch`."""
        observe, expert = self.meter.observe, work.expert
        observe(metrics.ENGINE_QUEUE, work.queue_s, expert)
        observe(metrics.PREFILL, work.prefill_s, expert)
        self.meter.add(metrics.TOKENS, work.prompt_tokens, expert, "prompt")
        if work.answer_tokens:
            observe(metrics.DECODE, work.decode_s, expert)
            self.meter.add(metrics.TOKENS, work.answer_tokens, expert, "completion")
        if work.answer_tokens > 1:
            observe(metrics.INTER_TOKEN_LATENCY, work.decode_s / (work.answer_tokens - 1), expert)

    def on_weights(self, expert: str, size_bytes: int) -> None:
        """See `EngineWatch`. Threads may call it."""
        self._weights[expert] = size_bytes

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        """See `EngineWatch`."""
        self._routes.add_sample(chosen)

    def on_removed(self, expert: str) -> None:
        """See `EngineWatch`."""
        self._routes.forget(expert)

    def registry(self, expert: str) -> CollectorRegistry:
        """See `EngineWatch`."""
        fresh = self._engines[expert] = CollectorRegistry()
        return fresh

    # --- reading

    async def routes_of(self, expert: str) -> dict[str, Any]:
        """See `PoolHandler.routes`."""
        return (await self._routes.tally(expert)).to_wire()

    async def text(self, labels: Mapping[str, str]) -> str:
        """Everything as Prometheus' text, every sample with these labels."""
        await self._routes.reckon()
        self.meter.refresh()
        collectors: list[tuple[Collector, Mapping[str, str]]] = [(self.meter.registry, labels)]
        collectors += [
            (engine, {**labels, "expert": expert}) for expert, engine in self._engines.items()
        ]
        return await asyncio.to_thread(text_of, collectors)
