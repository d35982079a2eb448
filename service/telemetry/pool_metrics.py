"""The metrics of a pool: read from its snapshot when asked for, so nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.link.snapshot import Snapshot
from service.types import Residency


class PoolCollector(Collector):
    """Queue lengths and residency, per expert."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

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
        return [waiting, running, residency]


def pool_text(collector: PoolCollector) -> bytes:
    """Our metrics and, from the process's own registry, vLLM's, as Prometheus text."""
    from prometheus_client import CollectorRegistry

    ours = CollectorRegistry()
    ours.register(collector)
    return generate_latest(ours) + generate_latest(REGISTRY)
