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


# By card and form of quantised weights, the kernels of a Mixtral's matrices and routed experts.
_KERNELS = {
    ("NVIDIA H200", "awq"): ["MacheteLinearKernel", "MarlinExperts"],
    ("NVIDIA H200", "fp8"): ["CutlassFP8ScaledMMLinearKernel", "TritonExperts"],
    ("NVIDIA H200", "fp8-block"): ["CutlassFp8BlockScaledMMKernel", "TritonExperts"],
    ("NVIDIA H200", "int8"): ["CutlassInt8ScaledMMLinearKernel", "TritonExperts"],
    ("NVIDIA A100-SXM4-80GB", "gptq"): ["MarlinExperts", "MarlinLinearKernel"],
    ("NVIDIA A100-SXM4-80GB", "fp8"): ["MarlinExperts", "MarlinFP8ScaledMMLinearKernel"],
    ("NVIDIA A100-SXM4-80GB", "packed"): ["MarlinExperts", "MarlinLinearKernel"],
}
_RIGHT = {"fixed": "", "ok": True, "same": True, "differs": True, "sets_no_config": True}
# A load for which the GPU has no room leaves the running model, and only layers that kernels want
# changed are moved there.
_RIGHT |= {"goes_on": True, "moves_what_changes": True}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each case shows."""
    return _run(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def quantised(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], dict[str, Any]]:
    """The same for quantised models, by card and case."""
    return {
        (card, case): result
        for card in {card for card, _ in _KERNELS}
        for forms in [[form for on, form in _KERNELS if on == card]]
        for case, result in _run(tmp_path_factory.mktemp("models"), *forms, card=card).items()
    }


def _run(folder: Path, *forms: str, card: str = "NVIDIA H200") -> dict[str, dict[str, Any]]:
    """Run the cases in a process of its own, because vLLM has one platform for a process."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.engine.cuda_exchanges",
            str(folder),
            *forms,
        ],
        env={**os.environ, **ENVIRONMENT, "PRETENDED_GPU": card},
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
    assert found[case] == {**_RIGHT, "kernels": found[case].get("kernels")}


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
@pytest.mark.parametrize(("card", "form"), _KERNELS)
def test_swap_of_quantised_gpu_weights_puts_in_place_what_vllm_makes_of_them(
    quantised: dict[tuple[str, str], dict[str, Any]], card: str, form: str, kind: str
) -> None:
    """In the layouts of the card's kernels, with all that they keep besides."""
    result = quantised[card, f"{kind} {form}"]
    kernels = [k for k in _KERNELS[card, form] if kind == "Mixtral" or "Experts" not in k]
    assert result == {**_RIGHT, "kernels": kernels}


@pytest.mark.parametrize("case", _FIXED)
def test_gpu_model_that_needs_other_weights_than_the_loaders_keeps_them(
    found: dict[str, dict[str, Any]], case: str
) -> None:
    """And its engine starts."""
    assert found[case]["ok"], found[case]
    assert f"has weights of {_FIXED[case]}; they can't be copied" in found[case]["fixed"]
