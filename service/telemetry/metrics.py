"""The Prometheus metrics of gateways and pools, and joining several processes' texts into one."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class GatewayMetrics:
    """What a gateway counts. `expert` and `category` are bounded by config and artifact."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "coe_requests",
            "Requests by expert, category and outcome (ok, client_gone, or an error's code).",
            ("expert", "category", "outcome"),
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "coe_first_byte_seconds",
            "From the request's arrival at the gateway to the first byte of its answer.",
            ("expert",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.total = Histogram(
            "coe_request_seconds",
            "From the request's arrival at the gateway to the end of its answer.",
            ("expert",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.route = Histogram(
            "coe_route_seconds",
            "Time to understand a request and choose its expert.",
            buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05),
            registry=self.registry,
        )
        self.queue = Histogram(
            "coe_queue_seconds",
            "Time a request waited in its pool's queue.",
            ("expert",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "coe_in_flight_requests", "Requests in this gateway now.", registry=self.registry
        )
        self.pools = Gauge("coe_pools", "Pools that this gateway hears of.", registry=self.registry)

    def text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self.registry).decode()


def join(own: str, others: Iterable[tuple[str, str]]) -> str:
    """One text of several: `others` are (pool, text), whose samples get the label `pool`."""
    families: dict[str, Metric] = {f.name: f for f in text_string_to_metric_families(own)}
    for pool, text in others:
        for family in text_string_to_metric_families(text):
            target = families.get(family.name)
            if target is None:
                target = Metric(family.name, family.documentation, family.type)
                families[family.name] = target
            for sample in family.samples:
                target.add_sample(
                    sample.name, {**sample.labels, "pool": pool}, sample.value, sample.timestamp
                )

    class _Joined(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Joined())
    return generate_latest(registry).decode()
