"""The findings of a run on a GPU as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.gpu.parts import FORMS
from loadtests.swap_gpu.methods import BUS, FILL, INPLACE, MAP, OF_BUS, SLEEP, START, WAKE

NOT_YET = "not run yet"
_HEAD = """# On a GPU

What `python -m loadtests.gpu` found, written by that program.
"""
_HOW = """**Not run yet.** Nobody has run it on a GPU. Whoever has one types `make setup GPU=1` and
`.venv/bin/python -m loadtests.gpu --page docs/benchmarks/gpu.md`; a quarter of an hour later this
page holds the figures. A run that is cut short goes on where it stopped when the command is typed
again. Where a command may take ten minutes at most, use `--minutes 9`, twice or three times.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A figure that the page has, whether it was measured or not.

    Attributes:
        part: The part that finds it.
        what: The finding that has it.
        key: Its name in the finding.
        title: Its name in the table.
        aim: What it should be; empty where nothing is promised.
    """

    part: str
    what: str
    key: str
    title: str
    aim: str = ""


def _doctor(part: str, what: str, *figures: tuple[str, str, str]) -> tuple[Row, ...]:
    verdict = Row(part, what, "verdict", f"{what}: tokens as fresh engines say", "proven")
    return (
        verdict,
        *(Row(part, what, key, f"{what}: {title}", aim) for key, title, aim in figures),
    )


def _swaps(part: str) -> tuple[Row, ...]:
    seconds = (BUS, INPLACE, WAKE, SLEEP, FILL, MAP, START)
    return (
        *(Row(part, what, "median_s", f"{what}, s") for what in seconds),
        Row(part, OF_BUS, "value", OF_BUS, "at least 0.8"),
    )


_IN_PLACE = (
    ("swap_s", "a swap, s", ""),
    ("copy_bytes_per_s", "copies, bytes/s", "0.8 of the memory's"),
    ("memory_bytes_per_s", "plain copies from pinned memory, bytes/s", ""),
    ("fill_bytes_per_s", "load to host memory, bytes/s", ""),
)
_ROOM = ("layer_room_ratio", "room in which a layer is made ready, of its size", "at most 3")
_STALLS = (
    ("stall_median_ratio", "time between tokens beside a load, of that without", "at most 1.2"),
    ("longest_gap_s", "longest time between tokens beside a load, s", ""),
)
ROWS = (
    Row("copies", "bus, pinned memory", "to_gb_s", "plain copies from pinned memory, GB/s"),
    Row("copies", "bus, pinned memory", "back_gb_s", "plain copies to pinned memory, GB/s"),
    Row("copies", "bus, pageable memory", "to_gb_s", "plain copies from pageable memory, GB/s"),
    Row("copies", "fill", "write_gb_s", "weights to shared memory, GB/s"),
    Row("copies", "fill", "register_s", "pinning 7.5 GB, s"),
    Row("copies", "fill", "step_ms_alone", "a decode alone, ms"),
    Row("copies", "fill", "step_ms_beside", "a decode beside the pinning, ms", "at most 1.2 times"),
    Row("copies", "fill", "longest_step_ms_beside", "longest decode beside the pinning, ms"),
    Row("copies", "copy_all", "gb_s", "copies into live parameters, GB/s", "0.8 of plain copies"),
    Row("copies", "copy_all", "every_tensor_is_right", "every tensor arrives", "true"),
    Row("copies", "copy_all", "captured_graph_sees_it", "captured graphs see it", "true"),
    *_doctor("doctor-quick", "inplace", *_IN_PLACE),
    *_swaps("swaps-eager"),
    *(row for form in FORMS for row in _doctor(f"doctor-{form}", "inplace", *_IN_PLACE, _ROOM)),
    *_doctor("doctor", "respawn", ("start_s", "start of an engine, s", "")),
    *_doctor("doctor", "inplace", *_IN_PLACE, *_STALLS),
    *_doctor(
        "doctor",
        "sleep",
        ("swap_s", "a swap, s", ""),
        ("sleep_s", "until the GPU is free, s", ""),
        ("wake_s", "until the engine is back, s", ""),
    ),
    *_doctor("doctor", "steering"),
    *_doctor("doctor", "capture"),
    *_swaps("swaps-graphs"),
    Row("tests", "pytest", "line", "`tests/gpu`", "all pass"),
    Row("tests-old-runner", "pytest", "line", "`tests/gpu` on vLLM's first runner", "all pass"),
)


def page(run: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> str:
    """Render the findings.

    Args:
        run: Facts of the run: date, versions, machine. Without them nothing was run.
        found: The findings in their order. Each has the name of its part.
    """
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for finding in found:
        by_part.setdefault(str(finding["part"]), []).append(finding)
    facts = [f"- {name}: {_shown(value)}" for name, value in run.items()]
    lines = [_HEAD, *(facts or [_HOW]), *([""] if facts else [])]
    for part in dict.fromkeys(row.part for row in ROWS):
        lines += [f"## {part}", "", "| finding | figure | aim |", "| --- | --- | --- |"]
        findings = by_part.pop(part, [])
        lines += [
            f"| {_cell(row.title)} | {_cell(figure(row, findings))} | {_cell(row.aim)} |"
            for row in ROWS
            if row.part == part
        ]
        lines += [*_others(part, findings), ""]
    for part, findings in by_part.items():
        head = [f"## {part}", "", "| finding | figure | aim |", "| --- | --- | --- |"]
        lines += [*head, *_others(part, findings), ""]
    return "\n".join(lines).rstrip() + "\n"


def figure(row: Row, findings: Iterable[Mapping[str, Any]]) -> str:
    """Return a row's figure: the last that was found, or why there is none."""
    value, why = "", NOT_YET
    for finding in findings:
        if finding.get("what") == row.what:
            if row.key in finding:
                value = _shown(finding[row.key])
            elif reason := finding.get("reason") or finding.get("failed"):
                why = f"not measured: {reason}"
            else:
                why = "not measured"
        elif finding.get("what") == "ended" and why == NOT_YET:
            said = f": {finding['why']}" if finding.get("why") else ""
            begun = not str(finding["exit"]).startswith("not ")
            why = f"not measured ({finding['exit']}{said})" if begun else str(finding["exit"])
    return value or why


def _others(part: str, findings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return rows for what else was found."""
    known = {(row.what, row.key) for row in ROWS if row.part == part}
    lines = []
    for finding in findings:
        title = str(finding.get("what", part))
        rest = {
            k: v
            for k, v in finding.items()
            if k not in ("part", "what") and (title, k) not in known
        }
        lines += [
            f"| {_cell(title)}: {_cell(name)} | {_cell(_shown(value))} | |"
            for name, value in _flat(rest)
        ]
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
