"""The parts of a run on a GPU, in the order of their worth, and the findings that they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_OLD_RUNNER = (("VLLM_USE_V2_MODEL_RUNNER", "0"),)


@dataclass(frozen=True, slots=True)
class Part:
    """A program whose output is findings.

    Attributes:
        name: Its name in the findings and in `--part`.
        about: What it shows, for the help.
        most_s: The longest that it may run, in s.
        command: Its command line.
        environment: Variables that it gets besides those of this process.
    """

    name: str
    about: str
    most_s: int
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()


def parts(*, on_cpu: bool) -> tuple[Part, ...]:
    """Return the parts. On a CPU these are only to try the run out, with what needs no GPU."""
    python = (sys.executable, "-m")
    copies = (*python, "loadtests.gpu.swap_copies_without_vllm")
    doctor = (*python, "service.cli", "doctor", "--json")
    quick = Part("doctor-quick", "swaps in place against transformers", 180, (*doctor, "--quick"))
    if on_cpu:
        return (Part("copies", "the copies under a swap", 60, (*copies, "--cpu")), quick)
    swap = (*python, "loadtests.swap_gpu", "--json")
    pytest = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-rs", "--tb=line", "tests/gpu")
    return (
        Part("copies", "the copies under a swap, without vLLM", 150, copies),
        quick,
        Part("swaps-eager", "7 B models: swaps beside plain copies", 240, (*swap, "--eager")),
        Part("doctor", "every method of swaps, steering and capture", 720, doctor),
        Part("swaps-graphs", "the same with captured graphs", 300, swap),
        Part("tests", "tests/gpu", 300, pytest),
        Part("tests-old-runner", "tests/gpu on vLLM's first runner", 300, pytest, _OLD_RUNNER),
    )


def findings(part: str, output: str) -> Iterator[dict[str, Any]]:
    """Yield the findings in a part's output: each JSON object that a line or the whole holds.

    Args:
        part: The name of the part.
        output: What it wrote to stdout. Lines that are no JSON are left out, but for pytest's
            summary.
    """
    try:
        whole = json.loads(output)
    except ValueError:
        whole = None
    if isinstance(whole, dict):
        yield {"part": part, **whole}
        return
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                yield {"part": part, **json.loads(line)}
            except ValueError:
                continue  # a program that was stopped in the middle of a line
        elif line.startswith(("FAILED", "ERROR", "SKIPPED")) or " passed" in line:
            yield {"part": part, "what": "pytest", "line": line.strip("= ")}
