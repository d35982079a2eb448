"""Draws the figures of a fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.fleet.experiments import WANTED, Curves

_Points = Sequence[tuple[float, float, float, float]]


def draw(curves: Curves, path: Path) -> list[str]:
    """Write the panels for which there are figures. The file's ending says the format.

    Returns:
        Why no plot was written, if so: what took an hour to play is worth more than its plot.
    """
    try:
        _draw(curves, path)
    except (ImportError, OSError, ValueError) as error:
        return [f"No plot was written: {error}."]
    return []


def _draw(curves: Curves, path: Path) -> None:
    import matplotlib  # for plots only, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        one
        for one in (
            ("requests/s", curves.by_load),
            ("experts per accelerator", curves.by_models),
            ("accelerators", curves.cost),
            ("s", curves.over_time),
        )
        if one[1]
    ]
    if not panels:
        raise ValueError("nothing to draw")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (label, found) in zip(axes[0], panels, strict=True):
        axis.set_xlabel(label)
        if found is curves.cost:
            axis.plot(*zip(*curves.cost, strict=True), marker="o")
            axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            axis.set_ylabel("processor time of decisions, ms a request")
            continue
        axis.set_ylabel("share that met the objective")
        axis.axhline(WANTED, color="grey", linewidth=0.5)
        if found is curves.over_time:
            for name, points in curves.over_time.items():
                axis.plot(*zip(*points, strict=True), label=name)
        else:
            _bands(axis, curves.by_load if found is curves.by_load else curves.by_models)
        axis.set_ylim(0, 1.03)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bands(axis: Any, systems: Mapping[str, _Points]) -> None:
    """Lines of medians, with bands from the least to the greatest repetition."""
    for name, points in systems.items():
        x, low, middle, high = zip(*points, strict=True)
        (line,) = axis.plot(x, middle, marker="o", markersize=3, label=name)
        axis.fill_between(x, low, high, alpha=0.2, color=line.get_color())
