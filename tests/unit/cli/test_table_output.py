"""The output of commands."""

from __future__ import annotations

import pytest

from service.cli.table_output import table


def test_output_prints_square_brackets_literally(capsys: pytest.CaptureFixture[str]) -> None:
    table(("candidate", "[/b] why"), [("cascade([a, b] → c)", "[bold]best")])
    printed = capsys.readouterr().out
    assert "cascade([a, b] → c)" in printed
    assert "[bold]best" in printed
    assert "[/b] why" in printed
