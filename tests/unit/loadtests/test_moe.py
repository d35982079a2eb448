"""The MoE load test joins its parts into one report."""

from __future__ import annotations

import sys

import pytest

from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.moe import __main__ as moe


def part(name: str, ok: bool) -> Report:
    made = Report(name, [TargetCheck(name, 1, 2, ok)], [Table(name, ("a",))], [f"note of {name}"])
    made.facts["value"] = name
    return made


def test_moe_load_test_joins_its_parts_into_one_report() -> None:
    whole = moe.joined({"one": lambda: part("one", True), "two": lambda: part("two", False)})
    assert [(item.name, item.ok) for item in whole.reach] == [("one", True), ("two", False)]
    assert [table.title for table in whole.tables] == ["one", "two"]
    assert whole.notes == ["note of one", "note of two"]
    assert whole.as_json()["two"] == {"value": "two"}


def test_moe_build_without_texts_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moe", "--part", "build"])
    with pytest.raises(SystemExit):
        moe.main()
    assert "--part build needs --data" in capsys.readouterr().err
