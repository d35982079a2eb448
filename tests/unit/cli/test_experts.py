"""The table of `coe experts`, and what `coe check` says of experts without weights of their own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from service.cli import cli
from service.cli.experts import _experts_table


def test_experts_table_says_whose_weights_an_expert_has() -> None:
    own: dict[str, Any] = {"state": "device", "reason": "", "waiting": 0, "running": 1}
    states = {"a": own | {"host_bytes": 2**30}, "b": own | {"host_bytes": 0, "shares": "a"}}
    written = io.StringIO()
    Console(width=120, file=written).print(_experts_table({"pools": {"p": states}}))
    first, second = written.getvalue().splitlines()[1:3]
    assert "1.00 GiB" in first
    assert "none: has those of a" in second


def test_check_says_whose_weights_an_expert_has(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "coe.yaml"
    file.write_text(
        "experts:\n  a: {model: ./m}\n  b: {model: ./m}\n  c: {base: b, defaults: {seed: 1}}\n"
        "pools: {p: {engine: simulated}}\n"
    )
    said = CliRunner().invoke(cli, ["check", str(file)])
    assert said.exit_code == 0, said.output
    for name in "bc":
        assert f"p: {name} has the weights of a and takes no memory" in said.output


def test_added_expert_s_fields_come_from_options_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, Any]] = []

    def admin(url: str, method: str, path: str, body: Any = None) -> dict[str, Any]:
        asked.append((method, path, body))
        return {}

    monkeypatch.setattr("service.cli.experts.admin", admin)
    more = tmp_path / "law.yaml"
    more.write_text("price: {prompt: 2}\ndefaults: {max_tokens: 9}\nadapter: /other\n")
    given = ["experts", "add", "law", "--base", "general", "--adapter", "/srv/law"]
    given += ["--system", "Be brief.", "--category", "law", "--file", str(more)]
    said = CliRunner().invoke(cli, given)
    assert (said.exit_code, said.output) == (0, "added: law\n")
    said = CliRunner().invoke(cli, ["experts", "remove", "org/law"])
    assert (said.exit_code, said.output) == (0, "removed: org/law\n")
    assert asked == [
        (
            "POST",
            "/admin/experts",
            {
                "name": "law",
                "base": "general",
                "adapter": "/srv/law",
                "price": {"prompt": 2},
                "defaults": {"max_tokens": 9, "system": "Be brief."},
                "categories": ["law"],
            },
        ),
        ("DELETE", "/admin/experts/org/law", None),
    ]
    more.write_text("- a list")
    said = CliRunner().invoke(cli, given)
    assert "a mapping with fields of an expert is needed" in str(said.exception)


def test_experts_says_which_added_ones_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "pools": {},
        "added": {
            "law": {"state": "left out", "reason": "the config has an expert of this name"},
            "new": {"state": "not served", "reason": ""},
            "fine": {"state": "served", "reason": ""},
        },
    }
    monkeypatch.setattr("service.cli.experts.admin", lambda *_: told)
    lines = CliRunner().invoke(cli, ["experts"]).output.splitlines()
    assert lines[-2:] == [
        "added law: left out: the config has an expert of this name",
        "added new: not served",
    ]
