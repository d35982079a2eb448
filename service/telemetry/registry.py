"""Counting in one process: a meter for the metrics that the table declares.

    meter = Meter(Side.GATEWAY)
    meter.add(metrics.REQUESTS_REJECTED, 1, "rate_limited")
    meter.put(metrics.BUDGET_REMAINING, 0.25, "eur")
    meter.observe(table.ROUTE, 0.0004)

Label values stand in the table's order. What another object knows anyway (a length, a
price) is asked for when metrics are read: give `on_read` a function that calls `put`.

A request adds a dozen values, so they are plain numbers here, without locks: call all of
this in one thread, the event loop's. Only `registry` may be read in another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from service import __version__
from service.telemetry import metrics
from service.telemetry.labels import MAX_SERIES, OTHER
from service.telemetry.metric_types import Kind, MetricSpec, Side
from service.telemetry.metrics import METRICS

# A metric and the values of its labels.
_Key = tuple[MetricSpec | str, ...]


class _Series:
    """One label set. `value` is a counter's or gauge's, and the sum of a histogram's values.

    `told`: what somebody else's counter stood at last.
    """

    __slots__ = ("buckets", "told", "value")

    def __init__(self, metric: MetricSpec) -> None:
        self.value = self.told = 0.0
        # One more than there are bounds: what is over all of them.
        self.buckets = [0] * (len(metric.buckets) + 1)


class MetricsRegistry:
    """The counters, gauges and histograms of one gateway or pool process."""

    def __init__(self, side: Side) -> None:
        self._declared = tuple(one for one in METRICS if one.side in (side, Side.BOTH))
        self._series: dict[_Key, _Series] = {}
        self._count = dict.fromkeys(self._declared, 0)
        self._readers: list[Callable[[], None]] = []
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Collector(self))
        ProcessCollector(registry=self.registry)
        self.put(metrics.BUILD_INFO, 1, __version__)

    def add(self, metric: MetricSpec, amount: float, *labels: str) -> None:
        """Count: `amount` ≥ 0 more."""
        (self._series.get((metric, *labels)) or self._new(metric, labels)).value += amount

    def total(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """A counter that somebody else keeps has come to `value`.

        Where it fell, as a part of it went away, what is counted from there on is added.
        """
        series = self._series.get((metric, *labels)) or self._new(metric, labels)
        series.value += max(0.0, value - series.told)
        series.told = value

    def put(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """A gauge stands at `value` now."""
        (self._series.get((metric, *labels)) or self._new(metric, labels)).value = float(value)

    def observe(self, metric: MetricSpec, value: float, *labels: str) -> None:
        """One value for a histogram."""
        series = self._series.get((metric, *labels)) or self._new(metric, labels)
        series.buckets[bisect_left(metric.buckets, value)] += 1
        series.value += value

    def forget(self, metric: MetricSpec, but: Collection[str] = ()) -> None:
        """Drop a metric's series, but for those whose first label is one of these: those that are
        still there are told again."""
        known = [key for key in self._series if key[0] is metric]
        gone = [key for key in known if len(key) == 1 or key[1] not in but]
        for key in gone:
            del self._series[key]
        self._count[metric] = len(known) - len(gone)

    def value(self, metric: MetricSpec, *labels: str) -> float:
        """What a counter or gauge stands at; 0 where nothing was counted."""
        series = self._series.get((metric, *labels))
        return series.value if series is not None else 0.0

    def on_read(self, reader: Callable[[], None]) -> None:
        """Call `reader` before metrics are read, in the event loop."""
        self._readers.append(reader)

    def refresh(self) -> None:
        """Ask the readers. Before `registry` is read."""
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
        made = self._series[(metric, *labels)] = _Series(metric)
        return made

    def families(self) -> Iterable[Metric]:
        """As Prometheus' client has them; every declared metric, also without a series yet."""
        found: dict[MetricSpec, list[tuple[tuple[str, ...], _Series]]] = {}
        # Copied at once: more may be counted meanwhile.
        for (metric, *labels), series in list(self._series.items()):
            assert isinstance(metric, MetricSpec)
            found.setdefault(metric, []).append((tuple(map(str, labels)), series))
        for one in self._declared:
            family = Metric(one.name.removesuffix("_total"), one.meaning, one.kind.value)
            for values, series in found.get(one, []):
                told = dict(zip(one.labels, values, strict=True))
                if one.kind is Kind.HISTOGRAM:
                    _histogram(family, one, told, series)
                else:
                    family.add_sample(one.name, told, series.value)
            yield family


def _histogram(family: Metric, one: MetricSpec, labels: dict[str, str], series: _Series) -> None:
    buckets, so_far = list(series.buckets), 0
    for bound, count in zip((*one.buckets, float("inf")), buckets, strict=True):
        so_far += count
        le = "+Inf" if bound == float("inf") else repr(float(bound))
        told = {**labels, "le": le}
        family.add_sample(f"{one.name}_bucket", told, so_far)
    family.add_sample(f"{one.name}_count", labels, so_far)
    if one.buckets[0] >= 0:
        # One that can fall would be taken for a counter that began anew.
        family.add_sample(f"{one.name}_sum", labels, series.value)


class _Collector(Collector):
    def __init__(self, meter: MetricsRegistry) -> None:
        self._meter = meter

    def collect(self) -> Iterable[Metric]:
        return self._meter.families()
