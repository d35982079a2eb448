"""Counting in one process: a meter for the metrics that the table declares.

    meter = Meter(Side.GATEWAY)
    meter.add(table.REJECTIONS, 1, "rate_limited")
    meter.put(table.BUDGET_LEFT, 0.25, "eur", "team-a")
    meter.observe(table.ROUTE, 0.0004)

Label values stand in the table's order. What another object knows anyway (a length, a
price) is asked for when metrics are read: give `on_read` a function that calls `put`.
Threads may call these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from service import __version__
from service.telemetry import table
from service.telemetry.table import MOST_SERIES, OTHER, TABLE, Declared, Kind, Side


class Meter:
    """The instruments of one gateway or pool process."""

    def __init__(self, side: Side) -> None:
        # A time of creation beside every series would double what is scraped.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._made: dict[Declared, Any] = {
            one: _make(one, self.registry) for one in TABLE if one.side in (side, Side.BOTH)
        }
        self._series: dict[tuple[Any, ...], Any] = {}
        self._count: dict[Declared, int] = {}
        self._readers: list[Callable[[], None]] = []
        self.put(table.BUILD, 1, __version__)

    def add(self, metric: Declared, amount: float, *labels: str) -> None:
        """Count: `amount` ≥ 0 more."""
        (self._series.get((metric, *labels)) or self._child(metric, labels)).inc(amount)

    def total(self, metric: Declared, value: float, *labels: str) -> None:
        """A counter that somebody else keeps has come to `value`."""
        child = self._series.get((metric, *labels)) or self._child(metric, labels)
        child.inc(max(0.0, value - child._value.get()))

    def put(self, metric: Declared, value: float, *labels: str) -> None:
        """A gauge stands at `value` now."""
        (self._series.get((metric, *labels)) or self._child(metric, labels)).set(value)

    def observe(self, metric: Declared, value: float, *labels: str) -> None:
        """One value for a histogram."""
        (self._series.get((metric, *labels)) or self._child(metric, labels)).observe(value)

    def forget(self, metric: Declared) -> None:
        """Drop a gauge's series: those that are still there are put again."""
        self._made[metric].clear()
        self._count.pop(metric, None)
        for key in [key for key in self._series if key[0] is metric]:
            del self._series[key]

    def value(self, metric: Declared, *labels: str) -> float:
        """What a counter or gauge stands at; 0 where nothing was counted."""
        child = self._series.get((metric, *labels))
        return float(child._value.get()) if child is not None else 0.0

    def on_read(self, reader: Callable[[], None]) -> None:
        """Call `reader` before metrics are read, in the event loop."""
        self._readers.append(reader)

    def refresh(self) -> None:
        """Ask the readers. Before `collect`, in the thread that they belong to."""
        for reader in self._readers:
            reader()

    def _child(self, metric: Declared, labels: tuple[str, ...]) -> Any:
        if len(labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {', '.join(metric.labels) or 'none'}")
        if self._count.get(metric, 0) >= MOST_SERIES:
            labels = (OTHER,) * len(labels)
        else:
            self._count[metric] = self._count.get(metric, 0) + 1
        made = self._made[metric]
        child = made.labels(*labels) if labels else made
        self._series[metric, *labels] = child
        return child


def _make(one: Declared, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if one.kind is Kind.COUNTER:
        return Counter(one.name, one.meaning, one.labels, registry=registry)
    if one.kind is Kind.GAUGE:
        return Gauge(one.name, one.meaning, one.labels, registry=registry)
    return Histogram(one.name, one.meaning, one.labels, buckets=one.buckets, registry=registry)
