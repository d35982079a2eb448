"""Swaps of quantised models and of a mixture in vLLM's CPU engine, by reference and by copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.real_engines import ENVIRONMENT

pytestmark = pytest.mark.engine
_WAYS = ("reference", "copies")
# As literals, because the list's module starts vLLM.
_CASES = ("gptq", "awq", "int8", "packed", "fp8", "mixture")
# By case, why its weights can't be copied on a CPU: its kernels keep them in an object of C++.
_CLOSED = {"int8": "dnnl_handler.handler_tensor has integers of its own, which may be addresses"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """What each case shows by way. Each way has a process, with one engine after another."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for way in _WAYS:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.support.engine.quantised_exchanges",
                str(tmp_path_factory.mktemp(way)),
                way,
            ],
            env={**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=420,
            check=False,
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                case = json.loads(line)
                lines[case.pop("case"), way] = case
        assert lines, done.stderr[-2000:]
    return lines


@pytest.mark.parametrize("way", _WAYS)
@pytest.mark.parametrize("case", _CASES)
def test_swap_of_quantised_weights_answers_as_before_and_as_transformers_says(
    found: dict[tuple[str, str], dict[str, Any]], case: str, way: str
) -> None:
    result = found[case, way]
    if way == "copies" and case in _CLOSED:
        assert result["state"] == "failed"
        assert _CLOSED[case] in result["reason"]
        return
    assert result["state"] == "host", result
    assert (result["ok"], result["back"], result["differ"], result["wrong"]) == (
        True,
        True,
        True,
        [],
    )


@pytest.mark.parametrize("case", [case for case in _CASES if case not in _CLOSED])
def test_swap_of_quantised_weights_equals_an_engine_started_with_them(
    found: dict[tuple[str, str], dict[str, Any]], case: str
) -> None:
    """Bit for bit, in either way: each engine starts with the model that the other swaps to."""
    reference, copies = (found[case, way] for way in _WAYS)
    assert reference["swapped"]["two"] == copies["fresh"]["two"]
    assert copies["swapped"]["one"] == reference["fresh"]["one"]
