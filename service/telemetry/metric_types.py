"""The declaration of a metric: kind, process, labels, and the buckets of a histogram."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# Upper bounds in s: for times that a client waits, for the gateway's own times, and for
# differences between actual and predicted times.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class Kind(StrEnum):
    """Prometheus' metric types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Side(StrEnum):
    """The processes that export a metric."""

    GATEWAY = "gateway"
    POOL = "pool"
    BOTH = "gateway, pool"


@dataclass(frozen=True, slots=True, eq=False)
class MetricSpec:
    """One declared metric.

    Attributes:
        name: The full name, as Prometheus stores it.
        kind: Counter, gauge or histogram.
        side: The processes that export it.
        meaning: The HELP text.
        labels: Names of the labels, in the order in which their values are passed.
        buckets: Upper bounds of a histogram, in the unit of the name.
    """

    name: str
    kind: Kind
    side: Side
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def counter(name: str, side: Side, labels: tuple[str, ...], meaning: str) -> MetricSpec:
    """Declare a counter."""
    return MetricSpec(name, Kind.COUNTER, side, meaning, labels)


def gauge(name: str, side: Side, labels: tuple[str, ...], meaning: str) -> MetricSpec:
    """Declare a gauge."""
    return MetricSpec(name, Kind.GAUGE, side, meaning, labels)


def histogram(
    name: str,
    side: Side,
    labels: tuple[str, ...],
    meaning: str,
    buckets: tuple[float, ...] = SECONDS,
) -> MetricSpec:
    """Declare a histogram."""
    return MetricSpec(name, Kind.HISTOGRAM, side, meaning, labels, buckets)
