"""Metrics of a pool process: counted when requests end, or read from the pool on demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from service.config import MoeCapture
from service.engine.engine_interface import EngineTimings, RoutingSample
from service.rpc.call_headers import Call, Times
from service.rpc.snapshot import Snapshot
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from service.telemetry.moe_collector import MoeCollector
from service.telemetry.prometheus_exposition import text_of
from service.types import Residency

_KV_USAGE = "vllm:kv_cache_usage_perc"


class LoadByExpert(Protocol):
    """The load of a pool that metrics tell."""

    @property
    def offered(self) -> Mapping[str, float]:
        """Engines that each expert's arriving requests keep busy."""

    @property
    def backlog_s(self) -> Mapping[str, float]:
        """Seconds in which one engine would serve each expert's waiting requests."""


class PoolStats(Protocol):
    """The state that metrics read from a pool."""

    def snapshot(self) -> Snapshot:
        """Return residency, queues and speeds."""

    def swap_counts(self) -> dict[tuple[str, str, str], int]:
        """Return the number of swaps by unit, method and reason."""

    def unload_counts(self) -> dict[tuple[str, str], int]:
        """Return the number of unloads by expert and reason."""

    def canary_failures(self) -> int:
        """Return the number of swaps whose weights failed verification."""

    def details(self) -> dict[str, dict[str, Any]]:
        """Return each expert's residency, with sizes."""

    def load(self) -> LoadByExpert:
        """Return the load that autoscaling goes by."""


class PoolMetrics:
    """The metrics registry of a pool, and its engines' own metrics.

    It observes the pool (`PoolObserver`) and its engines (`EngineObserver`). `traced` receives
    finished calls as well.

    Args:
        capture: How gates are sampled; None: not at all.
    """

    def __init__(self, capture: MoeCapture | None = None) -> None:
        self.registry = MetricsRegistry(Side.POOL)
        self._moe = MoeCollector(capture.every if capture is not None else 0, time.time)
        self.registry.on_read(lambda: self._moe.read(self.registry))
        # A creation time beside each series of an engine would double the scrape's size.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.traced: Callable[[Call, Times, str], None] | None = None
        self._weights: dict[str, int] = {}
        self._engines: dict[str, CollectorRegistry] = {}

    def follow(self, pool: PoolStats) -> None:
        """Read this pool's state whenever metrics are read."""
        self.registry.on_read(lambda: self._read(pool))

    def set_gpu_memory(self, gpu: str, **sizes: int) -> None:
        """Set the bytes of one GPU's memory, by state."""
        for state, size in sizes.items():
            self.registry.put(metric_declarations.GPU_MEMORY, size, gpu, state)

    def _read(self, pool: PoolStats) -> None:
        put, now = self.registry.put, pool.snapshot()
        # Drop the experts that a config change has removed.
        for gauge in (
            metric_declarations.REQUESTS_WAITING,
            metric_declarations.REQUESTS_RUNNING,
            metric_declarations.EXPERT_STATE,
            metric_declarations.EXPERT_WEIGHT_BYTES,
            metric_declarations.OFFERED_LOAD,
            metric_declarations.BACKLOG,
        ):
            self.registry.forget(gauge, keep=now.experts)
        for expert, queue in now.queues.items():
            put(metric_declarations.REQUESTS_WAITING, queue.waiting, expert)
            put(metric_declarations.REQUESTS_RUNNING, queue.running, expert)
        for expert, state in now.experts.items():
            for possible in Residency:
                put(
                    metric_declarations.EXPERT_STATE,
                    state.state is possible,
                    expert,
                    possible.value,
                )
        load = pool.load()
        for expert in now.experts:
            put(metric_declarations.OFFERED_LOAD, load.offered.get(expert, 0.0), expert)
            put(metric_declarations.BACKLOG, load.backlog_s.get(expert, 0.0), expert)
        for key, count in pool.swap_counts().items():
            self.registry.total(metric_declarations.SWAPS, count, *key)
        for (expert, reason), count in pool.unload_counts().items():
            self.registry.total(metric_declarations.UNLOADS, count, expert, reason)
        self.registry.total(metric_declarations.CANARY_FAILURES, pool.canary_failures())
        for expert, details in pool.details().items():
            held = details.get("held_as", expert)
            size = details.get("host_bytes", self._weights.get(held))
            if size is not None:
                for tier in (Residency.DEVICE, Residency.HOST):
                    held_bytes = size if details["state"] == tier else 0
                    put(metric_declarations.EXPERT_WEIGHT_BYTES, held_bytes, expert, tier.value)

    # --- as the pool's observer

    def ended(self, call: Call, times: Times, fault: str) -> None:
        if self.traced is not None:
            self.traced(call, times, fault)
        if times.began_s:
            self.registry.observe(metric_declarations.QUEUE, times.queue_s, call.expert)
            self.registry.observe(metric_declarations.SWAP_WAIT, times.swap_s, call.expert)

    # --- as its engines' observer

    def on_finished(self, timings: EngineTimings) -> None:
        observe, expert = self.registry.observe, timings.expert
        observe(metric_declarations.ENGINE_QUEUE, timings.queue_s, expert)
        observe(metric_declarations.PREFILL, timings.prefill_s, expert)
        self.registry.add(metric_declarations.TOKENS, timings.prompt_tokens, expert, "prompt")
        if timings.answer_tokens:
            observe(metric_declarations.DECODE, timings.decode_s, expert)
            self.registry.add(
                metric_declarations.TOKENS, timings.answer_tokens, expert, "completion"
            )
        if timings.answer_tokens > 1:
            observe(
                metric_declarations.INTER_TOKEN_LATENCY,
                timings.decode_s / (timings.answer_tokens - 1),
                expert,
            )

    def on_weights(self, expert: str, size_bytes: int) -> None:
        # Worker threads may call this.
        self._weights[expert] = size_bytes

    def on_routing_sample(self, sample: RoutingSample) -> None:
        self._moe.add_sample(sample)

    def on_removed(self, expert: str) -> None:
        self._moe.forget(expert)

    def engine_registry(self, expert: str) -> CollectorRegistry:
        fresh = self._engines[expert] = CollectorRegistry()
        return fresh

    # --- reading

    def kv_usage(self) -> float:
        """Return the used share of the fullest engine's KV cache; 0 where no engine tells."""
        return max(
            (
                sample.value
                for engine in self._engines.values()
                for family in engine.restricted_registry([_KV_USAGE]).collect()
                for sample in family.samples
            ),
            default=0.0,
        )

    async def routing_stats(self, expert: str) -> dict[str, Any]:
        return (await self._moe.tally(expert)).to_wire()

    async def text(self, labels: Mapping[str, str]) -> str:
        """Render all metrics as Prometheus text, with these labels on each sample."""
        await self._moe.compute()
        self.registry.refresh()
        collectors: list[tuple[Collector, Mapping[str, str]]] = [(self.registry.prometheus, labels)]
        collectors += [
            (engine, {**labels, "expert": expert}) for expert, engine in self._engines.items()
        ]
        return await asyncio.to_thread(text_of, collectors)
