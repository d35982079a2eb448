"""What commands print."""

from __future__ import annotations

import pytest

from service.cli.output import table


def test_brackets_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    table(("candidate", "why"), [("cascade([a, b] → c)", "[bold]best")])
    printed = capsys.readouterr().out
    assert "cascade([a, b] → c)" in printed
    assert "[bold]best" in printed
