"""Runs the parts of a run on a GPU one after another, and collects their findings."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, TextIO

from loadtests.gpu.parts import Part, findings

_LEAST_S = 30


def run_part(part: Part, limit_s: float, folder: Path) -> tuple[str, dict[str, Any]]:
    """Run a part, and end its whole process group at the limit.

    Args:
        part: The part.
        limit_s: The longest that it may run now, in s.
        folder: Its stdout is written to PART.out in there, and its stderr to PART.log.

    Returns:
        What it wrote to stdout, and a finding with its exit status and seconds.
    """
    began_s = time.monotonic()
    output = folder / f"{part.name}.out"
    environment = {**os.environ, **dict(part.environment)}
    with output.open("w") as out, (folder / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            part.command, stdout=out, stderr=log, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = f"ended after {limit_s:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = {"part": part.name, "what": "ended", "exit": code}
    return output.read_text(), {**ended, "seconds": round(time.monotonic() - began_s, 1)}


def run_all(chosen: list[Part], minutes: float, folder: Path, out: TextIO) -> list[dict[str, Any]]:
    """Run parts within a time, and print the findings of each as soon as it has ended.

    Args:
        chosen: The parts, in their order.
        minutes: The time for all of them. A part that has less than 30 s left is not started.
        folder: For what parts print, and for all findings in `findings.jsonl`.
        out: Takes a line of JSON for each finding.

    Returns:
        All findings, in their order.
    """
    end_s = time.monotonic() + 60 * minutes
    found: list[dict[str, Any]] = []

    def tell(finding: dict[str, Any]) -> None:
        found.append(finding)
        line = json.dumps(finding)
        print(line, file=out, flush=True)
        with (folder / "findings.jsonl").open("a") as kept:
            kept.write(line + "\n")

    for part in chosen:
        left_s = end_s - time.monotonic()
        if left_s < _LEAST_S:
            tell({"part": part.name, "what": "ended", "exit": "not started: no time is left"})
            continue
        output, ended = run_part(part, min(left_s, part.most_s), folder)
        for finding in findings(part.name, output):
            tell(finding)
        tell(ended)
    return found
