"""Draws the overview from a live Prometheus: `python -m deploy.grafana.overview_drawing URL FILE`.

The same queries as the dashboard's panels, drawn with matplotlib, where no Grafana is at hand.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

import matplotlib

from deploy.grafana.boards.overview import OVERVIEW
from deploy.grafana.dashboard_parts import Chart, Query

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WINDOW_S = 180
_STEP_S = 5
_RATE = "30s"
_LEGEND_COLUMNS = 6
_UNITS = {"reqps": "requests/s", "s": "s", "short": "", "percentunit": ""}


def _query_range(url: str, query: Query, now_s: float) -> list[dict[str, Any]]:
    """The series of a query over the window."""
    expr = query.expr.replace("$__rate_interval", _RATE).replace("$expert", ".*")
    parameters = {"query": expr, "start": now_s - WINDOW_S, "end": now_s, "step": _STEP_S}
    full_url = f"{url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(full_url, timeout=30) as reply:
        series: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return series


def _named(legend: str, labels: dict[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend


def _draw(axes: Axes, url: str, chart: Chart, now_s: float) -> None:
    lines = [
        (_named(query.legend, result["metric"]), result["values"])
        for query in chart.queries
        for result in _query_range(url, query, now_s)
    ]
    times = sorted({t for _, values in lines for t, _ in values})
    series = {name: [float(dict(values).get(t, "nan")) for t in times] for name, values in lines}
    # What has nothing to show but 0 is left out, unless all is like that.
    series = {name: vs for name, vs in series.items() if any(v > 0 for v in vs)} or series
    ago = [t - now_s for t in times]
    if chart.shape == "stacked" and series:
        filled = [[0.0 if v != v else v for v in values] for values in series.values()]
        axes.stackplot(ago, *filled, labels=list(series), alpha=0.75)
    else:
        for name, values in series.items():
            axes.plot(ago, values, label=name, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-WINDOW_S, 0)
    axes.set_ylabel(_UNITS.get(chart.unit, chart.unit), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    rows = -(-len(series) // _LEGEND_COLUMNS)
    if any(series):
        # Below the title, where it hides nothing.
        axes.legend(
            fontsize=7,
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.98),
            ncols=_LEGEND_COLUMNS,
            frameon=False,
            handlelength=1.2,
            columnspacing=1.2,
        )
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold", pad=8 + 11 * rows)


def _number(figure: Figure, url: str, chart: Chart, now_s: float, at: float) -> None:
    series = _query_range(url, chart.queries[0], now_s)
    value = float(series[0]["values"][-1][1]) if series else float("nan")
    text = f"{value * 1000:.1f} ms" if chart.unit == "s" and value < 1 else f"{value:.3g}"
    if chart.unit == "s" and value >= 1:
        text = f"{value:.2f} s"
    if chart.unit == "percentunit":
        text = f"{value:.1%}"
    figure.text(at, 0.945, text, fontsize=17, fontweight="bold", ha="center", color="#1f6f43")
    figure.text(at, 0.925, chart.title, fontsize=8, ha="center", color="#444444")


def draw(url: str, path: str) -> None:
    """The last minutes of the overview, as this Prometheus knows them, into a file."""
    now_s = time.time()
    (_, numbers), *rows = OVERVIEW.rows
    charts = [chart for _, row in rows for chart in row]
    figure = plt.figure(figsize=(13, 3.1 * ((len(charts) + 1) // 2) + 1.4))
    figure.suptitle(OVERVIEW.title, x=0.045, y=0.99, ha="left", fontsize=13)
    for i, chart in enumerate(numbers):
        _number(figure, url, chart, now_s, (i + 0.5) / len(numbers))
    grid = figure.add_gridspec(
        (len(charts) + 1) // 2, 2, left=0.06, right=0.985, top=0.875, bottom=0.05, hspace=0.45
    )
    for i, chart in enumerate(charts):
        _draw(figure.add_subplot(grid[i // 2, i % 2]), url, chart, now_s)
    figure.text(0.06, 0.012, "seconds before now", fontsize=8, color="#444444")
    figure.savefig(path, dpi=80)


def main() -> int:
    """0: drawn."""
    draw(*sys.argv[1:3])
    return 0


if __name__ == "__main__":
    sys.exit(main())
