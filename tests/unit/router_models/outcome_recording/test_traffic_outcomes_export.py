"""`coe outcomes export` and `forget` on the command line."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from router_models.outcome_recording.cli import group
from service.store.outcome_folder import OutcomeFolder

ROW = {"id": "1", "category": "math", "outcomes": {"a": {"score": 1.0}}}


@pytest.fixture
def folder(tmp_path: Path) -> OutcomeFolder:
    found = OutcomeFolder(tmp_path / "outcomes")
    found.add("acme", {**ROW, "prompt": "hello"}, time.time() - 60)
    found.add("other", ROW, time.time() - 60)
    return found


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(group, list(words))
    return result.exit_code, result.output


def test_export_writes_a_private_file_of_the_tenants_asked_for(
    folder: OutcomeFolder, tmp_path: Path
) -> None:
    out = tmp_path / "all.jsonl"
    code, said = run("export", "--folder", str(folder.path), "--out", str(out))
    assert (code, "2 rows, 1 with their prompts" in said) == (0, True), said
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    tenants = [json.loads(line)["tenant"] for line in out.read_text().splitlines()]
    assert tenants == ["acme", "other"]
    code, said = run("export", "--folder", str(folder.path), "--out", str(out))
    assert code == 1, "an existing file is not replaced"
    one = tmp_path / "one.jsonl"
    assert (
        run("export", "--folder", str(folder.path), "--tenant", "other", "--out", str(one))[0] == 0
    )
    assert "hello" not in one.read_text()


def test_export_without_outcomes_says_so_and_leaves_no_file(
    folder: OutcomeFolder, tmp_path: Path
) -> None:
    out = tmp_path / "none.jsonl"
    code, said = run("export", "--folder", str(folder.path), "--tenant", "x", "--out", str(out))
    assert (code, "has no outcomes of tenant 'x'" in said) == (1, True)
    assert run("export", "--folder", str(tmp_path / "nowhere"), "--out", str(out))[0] == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["--tenant", "acme"], ["other"]),
        (["--all"], []),
        ([], None),
        (["--all", "--tenant", "x"], None),
    ],
)
def test_forget_needs_to_be_told_whose(
    folder: OutcomeFolder, words: list[str], left: list[str] | None
) -> None:
    code, _ = run("forget", "--folder", str(folder.path), *words)
    assert code == (2 if left is None else 0)
    found = [tenant for tenant, _ in folder.rows()]
    assert found == (["acme", "other"] if left is None else left)


def test_folder_is_the_configs(folder: OutcomeFolder, tmp_path: Path) -> None:
    config = tmp_path / "coe.yaml"
    config.write_text(
        "experts: {a: {model: m}}\npools: {cpu: {engine: simulated}}\n"
        f"shadow: {{folder: {folder.path}}}\n"
    )
    code, said = run("forget", "--config", str(config), "--all")
    assert (code, "deleted 2 outcomes" in said) == (0, True)
