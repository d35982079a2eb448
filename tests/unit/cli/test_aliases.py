"""The table of `coe aliases`, and its restore."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli import aliases, cli

TOLD: dict[str, Any] = {
    "aliases": {
        "prod": {
            "old": {"weight": 95.0, "requests": 9, "errors": 0, "refusals": 1, "rolled_back": None},
            "new": {
                "weight": 5.0,
                "requests": 7,
                "errors": 6,
                "refusals": 0,
                "rolled_back": {"text": "85.7% errors in 7 requests, beside 0.0%"},
            },
        }
    }
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []

    def admin(url: str, method: str, path: str) -> Any:
        calls.append((method, path))
        return {"alias": "a/b", "restored": ["new"]} if path.endswith("/restore") else TOLD

    monkeypatch.setattr(aliases, "admin", admin)
    return calls


def test_aliases_shows_shares_and_roll_backs(asked: list[tuple[str, str]]) -> None:
    said = CliRunner().invoke(cli, ["aliases"], catch_exceptions=False).output
    rows = said.splitlines()
    assert rows[-2].split() == ["prod", "old", "95", "9", "0", "1"]
    assert rows[-1].endswith("rolled back: 85.7% errors in 7 requests, beside 0.0%")
    printed = CliRunner().invoke(cli, ["aliases", "--json"], catch_exceptions=False).output
    assert json.loads(printed) == TOLD


def test_aliases_restore_names_what_was_out(asked: list[tuple[str, str]]) -> None:
    said = CliRunner().invoke(cli, ["aliases", "restore", "a/b"], catch_exceptions=False).output
    assert said == "restored: new\n"
    assert asked == [("POST", "/admin/aliases/a/b/restore")]
