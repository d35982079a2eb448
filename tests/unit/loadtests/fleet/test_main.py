"""The command: what it measured is told whatever becomes of its plot."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.fleet import __main__ as command
from loadtests.fleet.experiments import QUICK


@pytest.mark.parametrize("path", ["plot.svg", "no/such/folder/plot.svg"])
def test_plot_that_cannot_be_drawn_is_a_note(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_play", lambda report, *_: report.notes.append("played"))
    report = command.measure([], QUICK, tmp_path / path)
    assert report.notes[0] == "played"
    assert report.notes[1].startswith("No plot was written: ")
