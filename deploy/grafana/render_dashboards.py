"""Renders the dashboards: `python -m deploy.grafana.render_dashboards`.

Writes dashboards/*.json beside this file; with `--check` it only tells whether they are as
rendered.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from deploy.grafana.boards.engines import ENGINES
from deploy.grafana.boards.overview import OVERVIEW
from deploy.grafana.boards.residency import RESIDENCY
from deploy.grafana.boards.routing import ROUTING
from deploy.grafana.boards.tenants import TENANTS
from deploy.grafana.dashboard_parts import Board, Chart

BOARDS = (OVERVIEW, ROUTING, RESIDENCY, TENANTS, ENGINES)
FOLDER = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = 8
_NUMBER_HEIGHT = 4


def rendered(board: Board) -> str:
    """A dashboard as the JSON that Grafana reads."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["coe"])
        .readonly()
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(dashboard.DashboardLink("coe").as_dropdown(True).tags(["coe"]).include_vars(True))
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("expert")
            .label("Expert")
            .datasource(_SOURCE)
            .query("label_values(coe_requests_total, expert)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    number = itertools.count(1)
    for title, charts in board.rows:
        made = made.with_row(dashboard.Row(title).id(next(number)))
        for chart in charts:
            made = made.with_panel(_panel(chart).id(next(number)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _panel(chart: Chart) -> Any:
    panel: Any
    if chart.shape == "number":
        panel = stat.Panel().reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    elif chart.shape == "states":
        panel = statetimeline.Panel().show_value(VisibilityMode.NEVER).legend(_legend())
    else:
        panel = (
            timeseries.Panel()
            .legend(_legend())
            .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
            .fill_opacity(10)
            .show_points(VisibilityMode.NEVER)
        )
        if chart.shape == "stacked":
            panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    panel = (
        panel.title(chart.title)
        .description(chart.about)
        .unit(chart.unit)
        .datasource(_SOURCE)
        .span(chart.width)
        .height(_NUMBER_HEIGHT if chart.shape == "number" else _HEIGHT)
    )
    if chart.shape != "states":
        panel = panel.min(0) if "less predicted" not in chart.title else panel
    for i, query in enumerate(chart.queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + i))
        if query.legend:
            target = target.legend_format(query.legend)
        panel = panel.with_target(target)
    return panel


def _legend() -> VizLegendOptions:
    return (
        VizLegendOptions()
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
    )


def main() -> int:
    """0: written, or as rendered."""
    wanted = {FOLDER / f"{board.uid}.json": rendered(board) for board in BOARDS}
    if "--check" in sys.argv[1:]:
        there = {path: path.read_text() for path in FOLDER.glob("*.json")}
        for path in sorted(set(wanted) | set(there)):
            if wanted.get(path) != there.get(path):
                print(f"{path.name} is not as rendered: make dashboards", file=sys.stderr)
        return int(wanted != there)
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
