"""The metrics of a pool: read from its snapshot when asked for, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.link.snapshot import Snapshot
from service.types import Residency


class PoolCollector(Collector):
    """Queue lengths, residency and swaps, per expert.

    The four sources are asked whenever metrics are read.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        swaps: Callable[[], dict[tuple[str, str, str], int]],
        canary_failures: Callable[[], int],
        details: Callable[[], dict[str, dict[str, Any]]],
    ) -> None:
        self._snapshot = snapshot
        self._swaps = swaps
        self._canary_failures = canary_failures
        self._details = details

    def collect(self) -> Iterable[Metric]:
        """The families, as of now."""
        now = self._snapshot()
        waiting = GaugeMetricFamily(
            "coe_queue_requests", "Requests waiting in the pool.", labels=["expert"]
        )
        running = GaugeMetricFamily(
            "coe_running_requests", "Requests on the pool's engines.", labels=["expert"]
        )
        residency = GaugeMetricFamily(
            "coe_residency",
            "1 for the state an expert's weights are in, 0 for the others.",
            labels=["expert", "state"],
        )
        for expert, queue in now.queues.items():
            waiting.add_metric([expert], queue.waiting)
            running.add_metric([expert], queue.running)
        for expert, state in now.experts.items():
            for possible in Residency:
                residency.add_metric([expert, possible.value], float(state.state is possible))
        swaps = CounterMetricFamily(
            "coe_swaps",
            "Swaps by the expert swapped in, method and reason.",
            labels=["expert", "method", "reason"],
        )
        for key, count in self._swaps().items():
            swaps.add_metric(list(key), count)
        canary = CounterMetricFamily(
            "coe_canary_failures", "Swaps after which the weights were not as first loaded."
        )
        canary.add_metric([], self._canary_failures())
        host = GaugeMetricFamily(
            "coe_host_bytes", "Memory measured for an expert's weights.", labels=["expert"]
        )
        for expert, told in self._details().items():
            if "host_bytes" in told:
                host.add_metric([expert], told["host_bytes"])
        return [waiting, running, residency, swaps, canary, host]


def pool_text(collector: PoolCollector) -> bytes:
    """Our metrics and, from the process's own registry, vLLM's, as Prometheus text."""
    from prometheus_client import CollectorRegistry

    ours = CollectorRegistry()
    ours.register(collector)
    return generate_latest(ours) + generate_latest(REGISTRY)
