"""The page of a run's findings."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.gpu import findings_table
from loadtests.gpu.findings_table import NOT_YET, ROWS, figure, page
from loadtests.gpu.part_runner import run_all
from loadtests.gpu.parts import line_findings, object_findings, parts
from loadtests.swap_gpu import __main__ as swap_gpu
from loadtests.swap_gpu import methods
from service.engine.swap_proof import PARTS, ProofFinding, Verdict

PAGE = Path(__file__).parents[4] / "docs" / "benchmarks" / "gpu.md"
ROOT = Path(__file__).parents[4]


def cells(text: str) -> dict[tuple[str, str], str]:
    """The figure of each row, by part and title."""
    found = {}
    part = ""
    for line in text.splitlines():
        if line.startswith("## "):
            part = line.removeprefix("## ")
        elif line.startswith("| ") and not line.startswith(("| finding", "| ---")):
            title, value, *_ = line.removeprefix("| ").removesuffix(" |").split(" | ")
            found[part, title] = value
    return found


def test_page_of_the_documents_has_every_row_and_says_that_none_was_run() -> None:
    text = PAGE.read_text(encoding="utf-8")
    found = cells(text)
    assert [(row.part, row.title) for row in ROWS if (row.part, row.title) not in found] == []
    if "Not run yet" in text:
        assert text == page({}, [])
        assert set(found.values()) == {NOT_YET}
        assert len(found) == len(ROWS)


def test_page_has_the_figure_of_each_row_and_whatever_else_was_found() -> None:
    found = [
        {"part": "copies", "what": "bus, pinned memory", "to_gb_s": 52.34567},
        {"part": "copies", "what": "copy_all", "every_tensor_is_right": True, "why": "a|b\nc"},
        {"part": "swaps-eager", "what": "ended", "exit": 1, "why": "no room on disk"},
        {"part": "doctor", "what": "ended", "exit": "not started: it needs 240 s"},
        {"part": "tests", "what": "pytest", "line": "9 passed in 99 s"},
        {"part": "more", "facts": {"in place": {"value": 0.14, "times": 10}}},
    ]
    text = page({"date": "2026-11-30", "GPUs": "NVIDIA H200"}, found)
    assert "- GPUs: NVIDIA H200" in text
    assert "Not run yet" not in text
    table = cells(text)
    for part, title, value in (
        ("copies", "plain copies from pinned memory, GB/s", "52.35"),
        ("copies", "every tensor arrives", "true"),
        ("copies", "copy_all: why", "a\\|b c"),
        ("swaps-eager", f"{methods.INPLACE}, s", "not measured (1: no room on disk)"),
        ("doctor", "sleep: a swap, s", "not started: it needs 240 s"),
        ("tests", "`tests/gpu`", "9 passed in 99 s"),
        ("swaps-graphs", methods.OF_BUS, NOT_YET),
        ("more", "more: facts, in place, value", "0.14 |"),
    ):
        assert table[part, title].removesuffix(" |") == value.removesuffix(" |"), (part, title)


def _of_copies() -> Iterator[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.gpu.swap_copies_without_vllm", "--cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        yield from line_findings("copies", line)


def _of_swaps(part: str) -> Iterator[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    found = swap_gpu.Found(14_000_000_000, known=told.append)
    names = (methods.BUS, methods.INPLACE, methods.WAKE, methods.SLEEP)
    names += (methods.FILL, methods.MAP, methods.START)
    for name in names:
        found.add(name, 0.5)
    found.done(*names)
    found.known({"what": methods.OF_BUS, "value": 1.0})
    for finding in told:
        yield from line_findings(part, json.dumps(finding))


def _of_doctor(part: str) -> Iterator[dict[str, Any]]:
    source = (ROOT / "service" / "cli" / "doctor" / "engine_trials.py").read_text()
    keys = {row.key for row in ROWS if row.part == part and row.key != "verdict"}
    assert [key for key in keys if f"{key}=" not in source] == []
    record = {
        "layout": {"architecture": "Llama", "dtype": "bfloat16", "quantization": "none"},
        "findings": {
            name: {
                "verdict": str(Verdict.PROVEN),
                "reason": "",
                "figures": dict.fromkeys(keys, 1.0),
            }
            for name in PARTS
        },
    }
    assert set(record["findings"]["sleep"]) == set(ProofFinding.__dataclass_fields__)  # type: ignore[index]
    yield from object_findings(part, {"records": [record]})


def test_every_row_is_what_its_part_prints() -> None:
    for part in parts(on_cpu=False):
        rows = [row for row in ROWS if row.part == part.name]
        assert rows, f"nothing of {part.name} is in the table"
        if part.name == "copies":
            found = list(_of_copies())
        elif part.name.startswith("swaps"):
            found = list(_of_swaps(part.name))
        elif part.name.startswith("doctor"):
            found = list(_of_doctor(part.name))
        else:
            found = list(line_findings(part.name, "= 9 passed, 1 skipped in 3 s ="))
        assert [row for row in rows if figure(row, found) == NOT_YET] == []


@pytest.mark.parametrize("part", parts(on_cpu=True), ids=lambda part: part.name)
def test_run_without_a_gpu_says_of_each_row_why_it_has_no_figure(part: Any, tmp_path: Path) -> None:
    if not part.refusal:
        # The other parts are run by hand, because they start engines.
        assert part.name == "copies" or "doctor" in part.command
        return
    found = run_all([part], 1, tmp_path, io.StringIO())
    for row in findings_table.ROWS:
        if row.part == part.name:
            assert figure(row, found) == "not run: it needs a GPU"
