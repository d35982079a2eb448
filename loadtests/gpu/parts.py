"""The parts of a run on a GPU, in the order of their worth, and the findings that they print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# In a command, the time that a part has, in minutes.
MINUTES = "{minutes}"
_NEEDS_GPU = "it needs a GPU"
_OLD_RUNNER = (("VLLM_USE_V2_MODEL_RUNNER", "0"),)
# Forms of quantised weights that the run tries, of those that fit 24 GB several times.
FORMS = ("fp8", "awq", "gptq")


@dataclass(frozen=True, slots=True)
class Part:
    """A program whose output is findings.

    Attributes:
        name: Its name in the findings and in `--part`.
        about: What it shows, for the help.
        most_s: The longest that it may run, in s. A command of a lent machine ends after 600 s.
        command: Its command line.
        environment: Variables that it gets besides those of this process.
        least_s: A part that has less time left is not started, in s.
        refusal: Why it can't run here; empty where it can.
    """

    name: str
    about: str
    most_s: int
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    least_s: int = 30
    refusal: str = ""


def parts(*, on_cpu: bool) -> tuple[Part, ...]:
    """Return the parts. On a CPU those that need no GPU try the run out, and the others say so."""
    python = (sys.executable, "-m")
    copies = (*python, "loadtests.gpu.swap_copies_without_vllm", *(("--cpu",) if on_cpu else ()))
    doctor = (*python, "service.cli", "doctor", "--json", "--minutes", MINUTES)
    swap = (*python, "loadtests.swap_gpu", "--lines")
    pytest = (*python, "pytest", "-q", "-p", "no:cacheprovider", "-rs", "--tb=line", "tests/gpu")
    refusal = _NEEDS_GPU if on_cpu else ""
    forms = tuple(
        Part(
            f"doctor-{form}",
            f"swaps in place of {form} weights",
            180,
            (*doctor, "--quick", "--quantization", form),
            least_s=90,
            # On a CPU without AMX there is no kernel for scaled float8.
            refusal=_NEEDS_GPU if on_cpu and form == "fp8" else "",
        )
        for form in FORMS
    )
    return (
        Part("copies", "the copies under a swap, without vLLM", 150, copies),
        Part(
            "doctor-quick",
            "swaps in place against transformers",
            180,
            (*doctor, "--quick"),
            least_s=90,
        ),
        Part(
            "swaps-eager",
            "7 B models: swaps beside plain copies",
            240,
            (*swap, "--eager"),
            least_s=120,
            refusal=refusal,
        ),
        *forms,
        Part(
            "doctor",
            "every method of swaps, steering and capture",
            540,
            doctor,
            least_s=240,
            refusal=refusal,
        ),
        Part(
            "swaps-graphs",
            "the same with captured graphs",
            300,
            swap,
            least_s=120,
            refusal=refusal,
        ),
        Part("tests", "tests/gpu", 300, pytest, least_s=120, refusal=refusal),
        Part(
            "tests-old-runner",
            "tests/gpu on vLLM's first runner",
            300,
            pytest,
            _OLD_RUNNER,
            least_s=120,
            refusal=refusal,
        ),
    )


def line_findings(part: str, line: str) -> Iterator[dict[str, Any]]:
    """Yield the findings in one line of a part's output: a JSON object, or pytest's summary."""
    if line.startswith("{"):
        try:
            found = json.loads(line)
        except ValueError:
            return  # a program that was stopped in the middle of a line, or a part of an object
        yield from object_findings(part, found)
    elif line.startswith(("FAILED", "ERROR", "SKIPPED")) or " passed" in line:
        yield {"part": part, "what": "pytest", "line": line.strip("= ")}


def object_findings(part: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the findings in a JSON object: itself, or one for each part of `coe doctor`'s records.

    Args:
        part: The name of the part.
        found: The object.
    """
    records = found.get("records")
    if not isinstance(records, list):
        yield {"part": part, **found}
        return
    for record in records:
        layout = record["layout"]
        weights = [str(layout[key]) for key in ("architecture", "dtype", "quantization")]
        for name, finding in record["findings"].items():
            told = {"verdict": finding["verdict"], **finding["figures"]}
            if finding["reason"]:
                told["reason"] = finding["reason"]
            yield {"part": part, "what": name, "weights": ", ".join(weights), **told}


def whole_findings(part: str, output: str) -> Iterator[dict[str, Any]]:
    """Yield the findings of a part whose output is one JSON object over several lines."""
    try:
        whole = json.loads(output)
    except ValueError:
        return
    if isinstance(whole, dict):
        yield from object_findings(part, whole)
