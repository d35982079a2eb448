"""The runner of GPU parts, with parts that need no GPU."""

from __future__ import annotations

import io
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from loadtests.gpu.part_runner import FINDINGS, finished, run_all, run_part
from loadtests.gpu.parts import MINUTES, Part

FACTS = {"GPUs": "NVIDIA H200"}


def part(name: str, code: str, most_s: int = 60) -> Part:
    return Part(name, "", most_s, (sys.executable, "-c", code), (("NAMED", name),))


def told(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in finding.items() if k != "seconds"} for finding in found]


def test_findings_are_kept_in_order_and_a_failing_part_stops_no_other(tmp_path: Path) -> None:
    out = io.StringIO()
    found = run_all(
        [
            part("a", 'import os; print(\'{"what": "x", "v": 1}\'); print(os.environ[\'NAMED\'])'),
            part("b", 'print(\'{"what": "y"}\'); raise SystemExit("it lacks room")'),
            part("c", "print('{\"v\":'); print(' 2}')"),
            replace(part("d", ""), command=("/no/such/program",)),
        ],
        1,
        tmp_path,
        out,
    )
    assert told(found) == [
        {"part": "a", "what": "x", "v": 1},
        {"part": "a", "what": "ended", "exit": 0},
        {"part": "b", "what": "y"},
        {"part": "b", "what": "ended", "exit": 1, "why": "it lacks room"},
        {"part": "c", "v": 2},
        {"part": "c", "what": "ended", "exit": 0},
        {"part": "d", "what": "ended", "exit": "not run: No such file or directory", "again": True},
    ]
    kept = (tmp_path / FINDINGS).read_text()
    assert kept == out.getvalue()
    assert [json.loads(line) for line in kept.splitlines()] == found


def test_finding_is_told_before_its_part_has_ended(tmp_path: Path) -> None:
    """The part goes on only when its finding was told."""
    code = (
        'import pathlib, time; print(\'{"what": "early"}\', flush=True)\n'
        f"while not pathlib.Path({str(tmp_path / 'told')!r}).exists(): time.sleep(0.01)\n"
        'print(\'{"what": "late"}\')'
    )
    found: list[dict[str, Any]] = []

    def tell(finding: dict[str, Any]) -> None:
        found.append(finding)
        (tmp_path / "told").touch()

    ended = run_part(part("a", code), 60, tmp_path, tell)
    assert ended["exit"] == 0
    assert [finding["what"] for finding in found] == ["early", "late"]


def test_a_part_that_hangs_is_ended_with_its_children_and_its_findings_are_kept(
    tmp_path: Path,
) -> None:
    code = (
        'import subprocess, sys, time; print(\'{"what": "early"}\', flush=True);'
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        " stdout=sys.stdout); time.sleep(600)"
    )
    found: list[dict[str, Any]] = []
    begun = threading.Event()
    # However slowly it starts, its limit comes after its finding.
    for limit_s in (3, 30, 300):
        found.clear()
        ended = run_part(part("slow", code, 600), limit_s, tmp_path, found.append)
        assert ended["exit"] == f"ended after {limit_s} s"
        if found:
            begun.set()
            break
    assert begun.is_set()
    assert found == [{"part": "slow", "what": "early"}]


def test_parts_without_time_are_told_and_not_started(tmp_path: Path) -> None:
    found = run_all([part("a", "raise SystemExit(1)")], 0, tmp_path, io.StringIO())
    why = "not started: it needs 30 s, and 0 s are left"
    assert found == [{"part": "a", "what": "ended", "exit": why, "again": True}]


def test_part_is_told_how_much_time_it_has(tmp_path: Path) -> None:
    code = "import sys; print('{\"v\": %s}' % sys.argv[1])"
    timed = Part("a", "", 60, (sys.executable, "-c", code, MINUTES))
    (found, _) = run_all([timed], 15, tmp_path, io.StringIO())
    assert 0 < found["v"] < 1


def test_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    code = f"open({str(runs)!r}, 'a').write('x'); print('{{\"v\": 1}}'); raise SystemExit"
    chosen = [part("works", f"{code}(0)"), part("fails", f"{code}(3)")]
    late = replace(part("late", f"{code}(0)"), least_s=1000, most_s=2000)
    assert finished(tmp_path, FACTS) == {}
    first = run_all([*chosen, late], 1, tmp_path, io.StringIO())
    assert runs.read_text() == "xx"
    done = finished(tmp_path, FACTS)
    assert set(done) == {"works", "fails"}
    second = run_all([*chosen, late], 60, tmp_path, io.StringIO(), done)
    assert runs.read_text() == "xxx"
    assert [f["part"] for f in second] == ["works"] * 2 + ["fails"] * 2 + ["late"] * 2
    assert second[:4] == first[:4]
    assert set(finished(tmp_path, FACTS)) == {"works", "fails", "late"}
    # Figures of another machine are none of this one.
    assert finished(tmp_path, {"GPUs": "NVIDIA A100"}) == {}
    assert finished(tmp_path, FACTS) == {}


def test_findings_of_a_run_that_was_killed_while_it_wrote_are_read(tmp_path: Path) -> None:
    finished(tmp_path, FACTS)
    run_all([part("a", "print('{\"v\": 1}')")], 1, tmp_path, io.StringIO())
    with (tmp_path / FINDINGS).open("a") as kept:
        kept.write('{"part": "b", "wh\n{"part": "b", "what": "half"}\n')
    assert set(finished(tmp_path, FACTS)) == {"a"}
