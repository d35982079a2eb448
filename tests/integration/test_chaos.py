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
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def missed(told: dict[str, Any]) -> list[str]:
    return [
        f"{one['name']}: {one['value']}"
        for one in told["reach"]
        if not one["ok"] and not one["name"].startswith(_TIMED)
    ]


def test_chaos_round_finds_no_violation() -> None:
    told = run(
        "loadtests.chaos",
        *("--rounds", "1", "--no-real", "--settle", "0.5", "--clients", "8", "--port", "8330"),
    )
    assert missed(told) == []
    # Everything that this machine can be made to suffer was.
    assert len(told["outcomes"]) >= 7
    if shutil.which("redis-server"):
        assert {"Redis stopped", "Redis hung"} <= told["outcomes"].keys()
    assert len(told["poison"]["lost"]) == 1
    assert told["poison"]["answers"] == [[500, "engine_died_twice"]]
    for name, kinds in told["outcomes"].items():
        assert kinds["right"] > 0, name


def test_short_soak_finds_no_leak() -> None:
    told = run("loadtests.soak", "--minutes", "0.2", "--clients", "8", "--port", "8340")
    assert missed(told) == []
    assert told["ended"]["right"] > 50
    assert told["ended"]["left by the client"] > 0
