"""Runs the parts of a run on a GPU one after another, and tells each finding as it is known."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from loadtests.gpu.parts import MINUTES, Part, line_findings, whole_findings

FINDINGS = "findings.jsonl"
_POLL_S = 0.2
# What a part keeps for ending by itself, of the time that it has.
_SPARE_S = 15
_MOST_WHY = 300
Tell = Callable[[dict[str, Any]], None]


def run_part(part: Part, limit_s: float, folder: Path, tell: Tell) -> dict[str, Any]:
    """Run a part, and end its whole process group at the limit.

    Args:
        part: The part.
        limit_s: The longest that it may run now, in s.
        folder: Its stdout is written to PART.out in there, and its stderr to PART.log.
        tell: Receives each finding as soon as the part has printed it.

    Returns:
        The last finding: exit status, seconds, and what it said last if it failed.
    """
    began_s = time.monotonic()
    output, log = folder / f"{part.name}.out", folder / f"{part.name}.log"
    minutes = f"{max(0.1, (limit_s - _SPARE_S) / 60):.2f}"
    command = [minutes if word == MINUTES else word for word in part.command]
    with output.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=err,
            env={**os.environ, **dict(part.environment)},
            start_new_session=True,
        )
        seen = _Output(part.name, output, tell)
        code: int | str = f"ended after {limit_s:.0f} s"
        try:
            while time.monotonic() - began_s < limit_s:
                seen.read()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_S)
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seen.end()
    ended: dict[str, Any] = {"part": part.name, "what": "ended", "exit": code}
    ended["seconds"] = round(time.monotonic() - began_s, 1)
    if isinstance(code, str) and limit_s < part.most_s:
        ended["again"] = True
    if code != 0 and (why := _last_line(log)):
        ended["why"] = why
    return ended


class _Output:
    """What a part has printed so far."""

    def __init__(self, part: str, path: Path, tell: Tell) -> None:
        self._part, self._path, self._tell = part, path, tell
        self._read = 0
        self._told = False

    def read(self) -> None:
        """Tell the findings in the lines that are complete."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole, newline, _ = text.rpartition(b"\n")
        self._read += len(whole) + len(newline)
        self._lines(whole)

    def end(self) -> None:
        """Tell the rest, or the findings of an object over several lines."""
        self.read()
        with self._path.open("rb") as file:
            file.seek(self._read)
            self._lines(file.read())
        if not self._told:
            for finding in whole_findings(self._part, self._path.read_text(errors="replace")):
                self._tell(finding)

    def _lines(self, text: bytes) -> None:
        for line in text.decode(errors="replace").splitlines():
            for finding in line_findings(self._part, line):
                self._told = True
                self._tell(finding)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_MOST_WHY] if lines else ""


def run_all(
    chosen: Iterable[Part],
    minutes: float,
    folder: Path,
    out: TextIO,
    done: Mapping[str, list[dict[str, Any]]] | None = None,
) -> list[dict[str, Any]]:
    """Run parts within a time.

    Args:
        chosen: The parts, in their order.
        minutes: The time for all of them.
        folder: For what parts print, and for all findings in `findings.jsonl`.
        out: Takes a line of JSON for each finding, the moment it is known.
        done: The findings of parts that an earlier run has finished, which don't run again.

    Returns:
        All findings, in the order of the parts.
    """
    end_s = time.monotonic() + 60 * minutes
    found: list[dict[str, Any]] = []

    def tell(finding: dict[str, Any]) -> None:
        found.append(finding)
        line = json.dumps(finding)
        print(line, file=out, flush=True)
        with (folder / FINDINGS).open("a") as kept:
            kept.write(line + "\n")

    for part in chosen:
        left_s = end_s - time.monotonic()
        if part.name in (done or {}):
            found += (done or {})[part.name]
        elif part.refusal:
            tell(_left_out(part, f"not run: {part.refusal}"))
        elif left_s < part.least_s:
            why = f"not started: it needs {part.least_s} s, and {max(0.0, left_s):.0f} s are left"
            tell(_left_out(part, why))
        else:
            try:
                tell(run_part(part, min(left_s, part.most_s), folder, tell))
            except OSError as error:
                tell(_left_out(part, f"not run: {error.strerror}"))
    return found


def _left_out(part: Part, why: str) -> dict[str, Any]:
    return {"part": part.name, "what": "ended", "exit": why, "again": True}


def finished(folder: Path, facts: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the findings of the parts that have ended in earlier runs, by part.

    Parts that were left out, or that had less than their time, run again.

    Args:
        folder: The folder of the findings. It is marked as one of these facts.
        facts: What a run's figures hold for: GPUs and versions. Runs of others count for nothing.
    """
    path = folder / FINDINGS
    begin = {"part": "run", "what": "facts", **facts}
    by_part: dict[str, list[dict[str, Any]]] = {}
    ended: dict[str, list[dict[str, Any]]] = {}
    same = False
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            finding = json.loads(line)
        except ValueError:
            continue  # a run that was killed while it wrote
        if finding.get("part") == "run":
            same = finding == begin
            if not same:
                by_part, ended = {}, {}
            continue
        if not same:
            continue
        by_part.setdefault(finding["part"], []).append(finding)
        if finding.get("what") == "ended":
            group = by_part.pop(finding["part"])
            if not finding.get("again"):
                ended[finding["part"]] = group
    with path.open("a") as kept:
        kept.write(json.dumps(begin) + "\n")
    return ended
