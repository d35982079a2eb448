"""One short round of the chaos test, and a soak test cut to seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]
# Judged by the clock of a machine that does other things as well: told, not tested.
_TIMED = ("s until new requests work", "MiB of", "times the memory")


def run(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", module, "--json", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sys.stderr.write(done.stderr[-6000:])
    data: dict[str, Any] = json.loads(done.stdout)
    return data


def missed(report: dict[str, Any]) -> list[str]:
    return [
        f"{item['name']}: {item['value']}"
        for item in report["reach"]
        if not item["ok"] and not item["name"].startswith(_TIMED)
    ]


def test_chaos_round_finds_no_violation() -> None:
    result = run(
        "loadtests.chaos",
        *("--rounds", "1", "--no-real", "--settle", "0.5", "--clients", "8", "--port", "8330"),
    )
    assert missed(result) == []
    # Everything that this machine can be made to suffer was.
    assert len(result["outcomes"]) >= 7
    if shutil.which("redis-server"):
        assert {"Redis stopped", "Redis hung"} <= result["outcomes"].keys()
    assert len(result["poison"]["lost"]) == 1
    assert result["poison"]["answers"] == [[500, "engine_died_twice"]]
    for name, kinds in result["outcomes"].items():
        assert kinds["right"] > 0, name


def test_short_soak_finds_no_leak() -> None:
    result = run("loadtests.soak", "--minutes", "0.2", "--clients", "8", "--port", "8340")
    assert missed(result) == []
    assert result["ended"]["right"] > 50
    assert result["ended"]["left by the client"] > 0
