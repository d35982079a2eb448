"""Swaps in models as vLLM builds them for a GPU. No GPU is needed, and no engine."""

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
_EXCHANGED = (
    "Mixtral",
    "Llama",
    "Llama tied",
    "Qwen2",
    "Qwen3",
    "Gemma2",
    "Phi3",
    "Glm4",
    "Cohere2",
)
_STORED = "Llama tied and stored"
# By case, why the weights stay.
_FIXED = {"fp8": "Fp8PerTensorOnlineLinearMethod"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case shows. vLLM has one platform for a process, so it runs in its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.engine.cuda_exchanges",
            str(tmp_path_factory.mktemp("models")),
        ],
        env={**os.environ, **ENVIRONMENT},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=420,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", [*_EXCHANGED, _STORED])
def test_swap_of_a_gpu_model_puts_in_place_what_vllm_loads(
    found: dict[str, dict[str, Any]], case: str
) -> None:
    """Every tensor, fused and tied as vLLM's own loader makes it, and back."""
    expected = {"fixed": "", "ok": True, "same": True, "differs": True, "sets_no_config": True}
    assert found[case] == expected


@pytest.mark.parametrize("case", _FIXED)
def test_gpu_model_that_needs_other_weights_than_the_loaders_keeps_them(
    found: dict[str, dict[str, Any]], case: str
) -> None:
    """And its engine starts."""
    assert found[case]["ok"], found[case]
    assert f"has weights of {_FIXED[case]}; they can't be copied" in found[case]["fixed"]
