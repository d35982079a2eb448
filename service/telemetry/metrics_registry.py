"""The metrics registry of one process, for the metrics that `metric_declarations.METRICS` declares.

    registry = MetricsRegistry(Side.GATEWAY)
    registry.add(metrics.REQUESTS_REJECTED, 1, "rate_limited")
    registry.put(metrics.BUDGET_REMAINING, 0.25, "eur")
    registry.observe(metrics.ROUTE, 0.0004)

Label values are passed in the order of the declaration. Values that another object holds anyway
(a queue length, a price) are read on demand: pass `on_read` a function that calls `put`.

A request adds a dozen values, so they are plain numbers without locks. Call all methods in one
thread, the event loop's; only `prometheus` may be read in another thread.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service import __version__
from service.telemetry import metric_declarations
from service.telemetry.label_values import MAX_SERIES, OTHER
from service.telemetry.metric_declarations import METRICS
from service.telemetry.metric_types import Kind, MetricSpec, Side

# A metric and the values of its labels.
_Key = tuple[MetricSpec | str, ...]


class _Series:
    """The values of one label set.

    Attributes:
        value: The value of a counter or gauge, or the sum of a histogram's values.
        last_total: The last value of an external counter, for `MetricsRegistry.total`.
        buckets: Counts by bucket of a histogram, the last one without an upper bound.
    """

    __slots__ = ("buckets", "last_total", "value")

    def __init__(self, metric: MetricSpec) -> None:
        self.value = self.last_total = 0.0
        self.buckets = [0] * (len(metric.buckets) + 1)


class MetricsRegistry:
    """The counters, gauges and histograms of one gateway or pool process."""

    def __init__(self, side: Side) -> None:
        self._declared = tuple(metric for metric in METRICS if metric.side in (side, Side.BOTH))
        self._series: dict[_Key, _Series] = {}
        self._count = dict.fromkeys(self._declared, 0)
        self._readers: list[Callable[[], None]] = []
        self.prometheus = CollectorRegistry(auto_describe=False)
        self.prometheus.register(_Collector(self))
        ProcessCollector(registry=self.prometheus)
        self.put(metric_declarations.BUILD_INFO, 1, __version__)

    def add(self, metric: MetricSpec, amount: float, *labels: str) -> None:
        """Increase a counter by `amount` ≥ 0."""
        (self._series.get((metric, *labels)) or self._new(metric, labels)).value += amount

    def total(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """Follow an external counter that now stands at `value`.

        When the external counter falls, because one of its parts went away, this one keeps its
        value and adds later increases.
        """
        series = self._series.get((metric, *labels)) or self._new(metric, labels)
        series.value += max(0.0, value - series.last_total)
        series.last_total = value

    def put(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        (self._series.get((metric, *labels)) or self._new(metric, labels)).value = float(value)

    def observe(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """Add one value ≥ 0 to a histogram. Prometheus would take a falling sum for a restart."""
        series = self._series.get((metric, *labels)) or self._new(metric, labels)
        series.buckets[bisect_left(metric.buckets, value)] += 1
        series.value += value

    def forget(self, metric: MetricSpec, keep: Collection[str] = ()) -> None:
        """Drop a metric's series, except those whose first label is in `keep`.

        Series that still exist are put again at the next read.
        """
        known = [key for key in self._series if key[0] is metric]
        gone = [key for key in known if len(key) == 1 or key[1] not in keep]
        for key in gone:
            del self._series[key]
        self._count[metric] = len(known) - len(gone)

    def value(self, metric: MetricSpec, *labels: str) -> float:
        """Return the value of a counter or gauge; 0 if the series does not exist."""
        series = self._series.get((metric, *labels))
        return series.value if series is not None else 0.0

    def on_read(self, reader: Callable[[], None]) -> None:
        """Call `reader` before metrics are read, in the event loop."""
        self._readers.append(reader)

    def refresh(self) -> None:
        """Call the readers. Call this before reading `prometheus`."""
        for reader in self._readers:
            reader()

    def _new(self, metric: MetricSpec, labels: tuple[str, ...]) -> _Series:
        if len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {', '.join(metric.labels) or 'none'}")
        if self._count[metric] >= MAX_SERIES:
            labels = (OTHER,) * len(labels)
            if (other := self._series.get((metric, *labels))) is not None:
                return other
        self._count[metric] += 1
        series = self._series[(metric, *labels)] = _Series(metric)
        return series

    def families(self) -> Iterable[Metric]:
        """Yield every declared metric, including those without a series."""
        found: dict[MetricSpec, list[tuple[tuple[str, ...], _Series]]] = {}
        # A copy: the event loop may add series meanwhile.
        for (key, *values), series in list(self._series.items()):
            assert isinstance(key, MetricSpec)
            found.setdefault(key, []).append((tuple(map(str, values)), series))
        for metric in self._declared:
            family = Metric(metric.name.removesuffix("_total"), metric.meaning, metric.kind.value)
            for label_values, series in found.get(metric, []):
                labels = dict(zip(metric.labels, label_values, strict=True))
                if metric.kind is Kind.HISTOGRAM:
                    _histogram(family, metric, labels, series)
                else:
                    family.add_sample(metric.name, labels, series.value)
            yield family


def _histogram(family: Metric, metric: MetricSpec, labels: dict[str, str], series: _Series) -> None:
    buckets, cumulative = list(series.buckets), 0
    for bound, count in zip((*metric.buckets, float("inf")), buckets, strict=True):
        cumulative += count
        le = "+Inf" if bound == float("inf") else repr(float(bound))
        bucket_labels = {**labels, "le": le}
        family.add_sample(f"{metric.name}_bucket", bucket_labels, cumulative)
    family.add_sample(f"{metric.name}_count", labels, cumulative)
    family.add_sample(f"{metric.name}_sum", labels, series.value)


class _Collector(Collector):
    def __init__(self, registry: MetricsRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        return self._registry.families()
