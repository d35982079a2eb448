"""vLLM's own engine configs for the shipped configs on GPUs. No GPU is needed, and no engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine.cuda_cards import CARDS
from tests.support.engine.real_engines import ENVIRONMENT

pytestmark = pytest.mark.engine
# With 24 GB, two GPUs hold half of this mixture of experts.
TOO_LARGE = {("NVIDIA GeForce RTX 4090", "node-8x80gb.yaml", "mixtral")}


@pytest.mark.parametrize("card", CARDS)
def test_vllm_takes_the_arguments_of_every_engine_of_the_shipped_configs(
    card: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.engine.cuda_engine_configs", str(tmp_path)],
        env={**os.environ, **ENVIRONMENT, "PRETENDED_GPU": card},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    engines: list[dict[str, Any]] = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")
    ]
    configs = {engine["config"] for engine in engines}
    assert configs == {"gpu-24gb.yaml", "node-8x80gb.yaml", "compose-gpu.yaml"}, done.stderr[-2000:]
    for engine in engines:
        assert "failed" not in engine, engine
        assert engine["device"] == "cuda"
        # vLLM's own default for every model on CUDA, and not what runs on a CPU.
        assert engine["second_runner"], engine
        assert 0 < engine["share"] <= 0.92
        fits = (card, engine["config"], engine["expert"]) not in TOO_LARGE
        assert engine["weights_fit"] is fits, engine
        assert engine["sleeps"] is (engine["config"] == "gpu-24gb.yaml")
        assert engine["tensor_parallel_size"] == (2 if "node" in engine["config"] else 1)
