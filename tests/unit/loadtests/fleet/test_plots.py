"""Plots of a fleet, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.fleet.experiments import Curves
from loadtests.fleet.plots import draw


@pytest.mark.parametrize(
    ("curves", "path"),
    [
        (Curves(), "plot.svg"),
        (Curves(cost=[(10, 1.0), (100, 1.1)]), "no/such/folder/plot.svg"),
        (Curves(cost=[(10, 1.0), (100, 1.1)]), "plot.unknown"),
    ],
)
def test_plot_that_cannot_be_drawn_is_a_note(curves: Curves, path: str, tmp_path: Path) -> None:
    (note,) = draw(curves, tmp_path / path)
    assert note.startswith("No plot was written: ")
    assert not list(tmp_path.iterdir())
