"""`coe moe show`: which experts a mixture of experts chooses, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from service.cli.http import admin, url_option
from service.errors import CoeError

# A cell by its load against the layer's mean: from how much on, its mark, and its colour of 256.
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
# What stands beside the map: layer, figures, and the gaps between.
_BESIDE = 48


@click.command()
@click.argument("expert")
@url_option
@click.option("--png", type=click.Path(dir_okay=False), help="Draw it into this file, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(expert: str, url: str, png: str | None, as_json: bool) -> None:
    """Load of EXPERT's routed experts by layer, as a heat map, and how even and cacheable it is.

    Its pool needs `vllm.moe_capture`. Reads the admin key's file.
    """
    from urllib.parse import quote

    told = admin(url, "GET", f"/admin/experts/{quote(expert)}/moe")
    if png is not None:
        draw(told, Path(png))
    if as_json:
        click.echo(json.dumps(told))
        return
    from rich.console import Console

    console = Console()
    console.print(heat_map(told, console.width))


def shade(load: float, mean: float) -> tuple[str, int]:
    """Mark and colour of a cell."""
    times = load / mean if mean else 0.0
    _, mark, colour = next(one for one in reversed(_SHADES) if times >= one[0])
    return mark, colour


def heat_map(told: dict[str, Any], width: int) -> Any:
    """The map for a terminal that is so many columns wide, with a line on what it shows."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    experts = told["shape"]["experts"]
    room = max(8, width - _BESIDE)
    cell = 2 if experts * 2 <= room else 1
    # Where they do not fit, neighbours share a cell.
    together = -(-experts // (room // cell))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "load", *_FIGURES):
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    for row in told["layers"]:
        load = row["load"]
        mean = sum(load) / len(load)
        cells = Text()
        for first in range(0, experts, together):
            part = load[first : first + together]
            mark, colour = shade(sum(part) / len(part), mean)
            cells.append(mark * cell, style=f"color({colour})")
        figures = ("–" if row[name] is None else f"{row[name]:.2f}" for name in _FIGURES)
        table.add_row(str(row["layer"]), cells, *figures)
    shape = told["shape"]
    head = Text(
        f"{told['expert']}: {shape['layers']} layers of {experts} experts, {shape['top_k']} a "
        f"token; {told['tokens']} tokens seen, in one step of {told['every']}"
    )
    legend = Text("load against the layer's mean: ")
    for least, mark, colour in _SHADES:
        legend.append(f"{mark}{mark}", style=f"color({colour})")
        legend.append(f"≥{least:g} ")
    lines: list[Any] = [head, table, legend]
    if together > 1:
        lines.append(Text(f"{together} neighbouring experts share a mark"))
    return Group(*lines)


def draw(told: dict[str, Any], path: Path) -> None:
    """The same as a picture. Raises CoeError where it can't be drawn or written."""
    try:
        import matplotlib  # slow to import, and only here
    except ImportError:
        raise CoeError("--png needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        [n * len(row["load"]) / max(1, sum(row["load"])) for n in row["load"]]
        for row in told["layers"]
    ]
    shape = told["shape"]
    size = (min(16, 3 + shape["experts"] * 0.18), min(14, 2 + len(rows) * 0.2))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set(
        xlabel="routed expert", ylabel="layer", title=f"{told['expert']}, {told['tokens']} tokens"
    )
    axes.set_yticks(range(len(rows)), [str(row["layer"]) for row in told["layers"]], fontsize=7)
    figure.colorbar(image, label="load, times the layer's mean")
    try:
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        raise CoeError(f"{path} can't be written: {error.strerror}") from None
    finally:
        pyplot.close(figure)
