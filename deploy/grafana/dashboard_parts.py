"""The parts of a dashboard: Prometheus queries, charts and rows."""

from __future__ import annotations

from dataclasses import dataclass

# Grafana puts at least four scrapes into this; the test puts its own.
RATE = "$__rate_interval"
EXPERT = 'expert=~"$expert"'


@dataclass(frozen=True)
class Query:
    """A PromQL expression; `legend` names its series by their labels."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Chart:
    """A panel. `unit` is Grafana's name; `shape`: lines, stacked, number or states."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    shape: str = "lines"
    about: str = ""
    width: int = 12


@dataclass(frozen=True)
class Board:
    """A dashboard: rows of charts."""

    uid: str
    title: str
    about: str
    rows: tuple[tuple[str, tuple[Chart, ...]], ...]


def rate(metric: str, by: str = "", where: str = "") -> str:
    """Per second, added up by labels."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{where}}}[{RATE}]))"


def quantile(q: float, metric: str, by: str = "", where: str = "") -> str:
    """Return a quantile of a histogram by labels."""
    labels = ", ".join(part for part in ("le", by) if part)
    return f"histogram_quantile({q}, {rate(metric + '_bucket', labels, where)})"


def mean(metric: str, where: str = "") -> str:
    """Return the mean of a histogram's values."""
    return f"{rate(metric + '_sum', '', where)} / {rate(metric + '_count', '', where)}"


def quantiles(metric: str, where: str = "") -> tuple[Query, ...]:
    """Median, 95th and 99th percentile."""
    return tuple(Query(quantile(q, metric, "", where), f"p{q * 100:g}") for q in (0.5, 0.95, 0.99))
