"""`coe moe show`: the load of a model's routed experts, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from service.cli.http_client import admin, url_option
from service.errors import CoeError

# (least load of a cell divided by the layer's mean, its mark, its colour of 256).
_SHADES = (
    (0.0, " ", 233),
    (0.05, "·", 17),
    (0.25, "░", 18),
    (0.5, "░", 24),
    (0.75, "▒", 30),
    (1.0, "▒", 71),
    (1.5, "▓", 148),
    (2.0, "▓", 214),
    (3.0, "█", 202),
    (5.0, "█", 196),
)
_FIGURES = ("imbalance", "entropy", "srp", "sch")
# Columns beside the map: layer, figures, and gaps.
_MARGIN_COLUMNS = 48


@click.command()
@click.argument("expert")
@url_option
@click.option("--png", type=click.Path(dir_okay=False), help="Also draw the map into this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(expert: str, url: str, png: str | None, as_json: bool) -> None:
    """Show the load of EXPERT's routed experts by layer as a heat map.

    Also shows how even and how cacheable the load is. The pool needs `vllm.moe_capture`. Reads
    the admin key from its file.
    """
    from urllib.parse import quote

    stats = admin(url, "GET", f"/admin/experts/{quote(expert)}/moe")
    if png is not None:
        draw(stats, Path(png))
    if as_json:
        click.echo(json.dumps(stats))
        return
    from rich.console import Console

    console = Console()
    console.print(heat_map(stats, console.width))


def shade(load: float, mean: float) -> tuple[str, int]:
    """Return mark and colour of a cell."""
    ratio = load / mean if mean else 0.0
    _, mark, colour = next(level for level in reversed(_SHADES) if ratio >= level[0])
    return mark, colour


def heat_map(stats: dict[str, Any], width: int) -> Any:
    """Build the map for a terminal of `width` columns, with a legend."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    experts = stats["shape"]["experts"]
    columns = max(8, width - _MARGIN_COLUMNS)
    cell = 2 if experts * 2 <= columns else 1
    # If the experts do not fit, neighbours share a cell.
    experts_per_cell = -(-experts // (columns // cell))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "load", *_FIGURES):
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    for row in stats["layers"]:
        load = row["load"]
        mean = sum(load) / len(load)
        cells = Text()
        for first in range(0, experts, experts_per_cell):
            part = load[first : first + experts_per_cell]
            mark, colour = shade(sum(part) / len(part), mean)
            cells.append(mark * cell, style=f"color({colour})")
        figures = ("–" if row[name] is None else f"{row[name]:.2f}" for name in _FIGURES)
        table.add_row(str(row["layer"]), cells, *figures)
    shape = stats["shape"]
    head = Text(
        f"{stats['expert']}: {shape['layers']} layers of {experts} experts, {shape['top_k']} per "
        f"token; {stats['tokens']} tokens sampled, from one step in {stats['every']}"
    )
    legend = Text("load against the layer's mean: ")
    for least, mark, colour in _SHADES:
        legend.append(f"{mark}{mark}", style=f"color({colour})")
        legend.append(f"≥{least:g} ")
    lines: list[Any] = [head, table, legend]
    if experts_per_cell > 1:
        lines.append(Text(f"{experts_per_cell} neighbouring experts share a mark"))
    return Group(*lines)


def draw(stats: dict[str, Any], path: Path) -> None:
    """Draw the map as a picture.

    Raises:
        CoeError: matplotlib is missing, or the file can't be written.
    """
    try:
        import matplotlib  # slow to import
    except ImportError:
        raise CoeError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        [n * len(row["load"]) / max(1, sum(row["load"])) for n in row["load"]]
        for row in stats["layers"]
    ]
    shape = stats["shape"]
    size = (min(16, 3 + shape["experts"] * 0.18), min(14, 2 + len(rows) * 0.2))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(
        xlabel="routed expert", ylabel="layer", title=f"{stats['expert']}, {stats['tokens']} tokens"
    )
    axes.set_yticks(range(len(rows)), [str(row["layer"]) for row in stats["layers"]], fontsize=7)
    figure.colorbar(image, label="load, times the layer's mean")
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise CoeError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
