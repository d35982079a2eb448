"""From the findings of trials to the findings of a record. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.cli.doctor.trial_spec import TrialLine
from service.engine.swap_proof import PARTS, ProofFinding, Verdict, one_line

TIME_RAN_OUT = "time ran out"
# vLLM's words where the engine core failed, and the prefix of its log lines.
_POINTER = "See root cause above"
_LOG_PREFIX = re.compile(r"^\([^)]*\) (?:\w+ [\d-]+ [\d:]+ \[[^\]]*\] )?")
_EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception)(?:: |$)")


class TrialEnd(StrEnum):
    """How a trial's process ended."""

    DONE = "done"
    KILLED = "killed by the time limit"
    DIED = "died"
    NOT_BEGUN = "not begun"


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """A trial's findings, and how its process ended.

    Attributes:
        parts: The parts that the trial proves.
        lines: Its findings.
        end: How its process ended.
        last_words: The last line of its log, for a process that died.
        root_cause: The first exception in its log, or an empty string.
    """

    parts: tuple[str, ...]
    lines: Sequence[TrialLine]
    end: TrialEnd
    last_words: str = ""
    root_cause: str = ""


def findings_of(outcomes: Iterable[TrialOutcome]) -> dict[str, ProofFinding]:
    """Return the finding of each part that a trial was about.

    A part without a verdict is not proven where time ran out, and failed where the process died.
    """
    figures: dict[str, dict[str, float]] = {}
    verdicts: dict[str, tuple[Verdict, str]] = {}
    for outcome in outcomes:
        for line in outcome.lines:
            if line.kind == "figure":
                # A clock that stood still makes a rate of infinity, which no record can hold.
                found = {n: value for n, value in line.figures.items() if math.isfinite(value)}
                figures.setdefault(line.part, {}).update(found)
            elif line.kind == "verdict" and line.part in PARTS:
                verdict = Verdict.PROVEN if line.ok else Verdict.FAILED
                verdicts[line.part] = verdict, "" if line.ok else _reason(line, outcome.root_cause)
        for part in outcome.parts:
            if part not in verdicts:
                verdicts[part] = _without_verdict(outcome)
    return {
        part: ProofFinding(verdict, reason, figures.get(part, {}))
        for part, (verdict, reason) in verdicts.items()
    }


def _reason(line: TrialLine, root_cause: str) -> str:
    """Return why a part failed. Where vLLM only points to its log, the log's first error counts."""
    if not root_cause or _POINTER not in line.reason:
        return one_line(line.reason)
    step, _, _ = line.reason.partition(": ")
    return one_line(f"{step}: {root_cause}")


def root_cause(log: str) -> str:
    """Return the first exception in the log of a trial and of its engine core, without a prefix."""
    for line in log.splitlines():
        text = _LOG_PREFIX.sub("", line).strip()
        if _EXCEPTION.match(text) and _POINTER not in text:
            return one_line(text)
    return ""


def _without_verdict(outcome: TrialOutcome) -> tuple[Verdict, str]:
    steps = [line.part for line in outcome.lines if line.kind == "step"]
    step = steps[-1] if steps else "starting the trial"
    match outcome.end:
        case TrialEnd.NOT_BEGUN:
            return Verdict.UNTRIED, TIME_RAN_OUT
        case TrialEnd.KILLED:
            return Verdict.UNTRIED, f"{TIME_RAN_OUT} while {step}"
        case TrialEnd.DIED:
            words = f": {outcome.last_words}" if outcome.last_words else ""
            return Verdict.FAILED, one_line(f"the process died while {step}{words}")
        case TrialEnd.DONE:
            return Verdict.FAILED, f"the trial ended without a verdict after {step}"


def prepare_fault(outcome: TrialOutcome) -> str | None:
    """Return why there are no models to try, or None."""
    for line in outcome.lines:
        if line.kind == "verdict" and not line.ok:
            return f"no random model could be made: {one_line(line.reason)}"
    if outcome.end is TrialEnd.DONE:
        return None
    return _without_verdict(outcome)[1]


def figure_rows(findings: Mapping[str, ProofFinding]) -> list[tuple[str, str, str]]:
    """Return a row for each part: its name, its verdict with the reason, and its figures."""
    rows = []
    for part in PARTS:
        finding = findings.get(part)
        if finding is None:
            continue
        verdict = f"{finding.verdict}: {finding.reason}" if finding.reason else str(finding.verdict)
        rows.append((part, verdict, ", ".join(_shown(finding.figures))))
    return rows


def _shown(figures: Mapping[str, float]) -> Iterable[str]:
    for name, value in sorted(figures.items()):
        if name.endswith("_bytes_per_s"):
            yield f"{name.removesuffix('_bytes_per_s')} {value / 1e9:.2f} GB/s"
        elif name.endswith("_bytes"):
            yield f"{name.removesuffix('_bytes')} {value / 1e9:.3f} GB"
        elif name.endswith("_ratio"):
            yield f"{name.removesuffix('_ratio').replace('_', ' ')} × {value:.2f}"
        else:
            yield f"{name.removesuffix('_s').replace('_', ' ')} {value:.3g} s"
