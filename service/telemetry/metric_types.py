"""What a metric is: its kind, who tells it, its labels and, of a histogram, its buckets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# Upper bounds in s: of what a client waits for, of what is ours alone, of what was predicted.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
ERROR = (-60, -30, -10, -5, -2, -1, -0.5, -0.1, 0, 0.1, 0.5, 1, 2, 5, 10, 30, 60)


class Kind(StrEnum):
    """What can be done with a metric's values."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Side(StrEnum):
    """Which processes tell a metric."""

    GATEWAY = "gateway"
    POOL = "pool"
    BOTH = "gateway, pool"


@dataclass(frozen=True, slots=True, eq=False)
class MetricSpec:
    """One metric: its full name as Prometheus stores it, and what it means.

    `buckets`: upper bounds, histograms only, in the unit of the name.
    """

    name: str
    kind: Kind
    side: Side
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def counter(name: str, side: Side, labels: tuple[str, ...], meaning: str) -> MetricSpec:
    """It only grows."""
    return MetricSpec(name, Kind.COUNTER, side, meaning, labels)


def gauge(name: str, side: Side, labels: tuple[str, ...], meaning: str) -> MetricSpec:
    """It goes up and down."""
    return MetricSpec(name, Kind.GAUGE, side, meaning, labels)


def histogram(
    name: str,
    side: Side,
    labels: tuple[str, ...],
    meaning: str,
    buckets: tuple[float, ...] = SECONDS,
) -> MetricSpec:
    """Values by buckets."""
    return MetricSpec(name, Kind.HISTOGRAM, side, meaning, labels, buckets)
