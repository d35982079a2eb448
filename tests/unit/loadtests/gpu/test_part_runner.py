"""The runner of GPU parts, with parts that need no GPU."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

from loadtests.gpu.part_runner import run_all, run_part
from loadtests.gpu.parts import Part


def part(name: str, code: str, most_s: int = 20) -> Part:
    return Part(name, "", most_s, (sys.executable, "-c", code), (("NAMED", name),))


def test_findings_are_kept_in_order_and_a_failing_part_stops_no_other(tmp_path: Path) -> None:
    out = io.StringIO()
    found = run_all(
        [
            part("a", 'import os; print(\'{"what": "x", "v": 1}\'); print(os.environ[\'NAMED\'])'),
            part("b", 'print(\'{"what": "y"}\'); raise SystemExit(3)'),
            part("c", "print('{\"v\":'); print(' 2}')"),
        ],
        1,
        tmp_path,
        out,
    )
    told = [{k: v for k, v in finding.items() if k != "seconds"} for finding in found]
    assert told == [
        {"part": "a", "what": "x", "v": 1},
        {"part": "a", "what": "ended", "exit": 0},
        {"part": "b", "what": "y"},
        {"part": "b", "what": "ended", "exit": 3},
        {"part": "c", "v": 2},
        {"part": "c", "what": "ended", "exit": 0},
    ]
    kept = (tmp_path / "findings.jsonl").read_text()
    assert kept == out.getvalue()
    assert [json.loads(line) for line in kept.splitlines()] == found


def test_a_part_that_hangs_is_ended_with_its_children_and_its_findings_are_kept(
    tmp_path: Path,
) -> None:
    code = (
        'import subprocess, sys, time; print(\'{"what": "early"}\', flush=True);'
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " stdout=sys.stdout); time.sleep(60)"
    )
    began_s = time.monotonic()
    output, ended = run_part(part("slow", code), 3, tmp_path)
    assert time.monotonic() - began_s < 30
    assert output == '{"what": "early"}\n'
    assert ended["exit"] == "ended after 3 s"


def test_parts_without_time_are_told_and_not_started(tmp_path: Path) -> None:
    found = run_all([part("a", "raise SystemExit(1)")], 0, tmp_path, io.StringIO())
    assert found == [{"part": "a", "what": "ended", "exit": "not started: no time is left"}]
