"""Steered experts on a GPU, with and without captured graphs. Skipped without a GPU.

The tokens of a random model have nearly equal probabilities, and a GPU's sums differ from a CPU's.
Therefore the tests compare tokens with the probabilities of the reference, not with its tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from service.config import VllmOptions
from service.engine.steering_data import RECORD_CHOICES_KEY
from service.engine.vllm.swapping_engine import Canary, SwappingVllmEngine, Weights
from tests.gpu.test_gpu_swap import why_no_gpu
from tests.support.engine.real_engines import BASE, greedy
from tests.support.engine.steered_tiny_mixtral import PROMPT, RULES, Steering
from tests.support.engine.tiny_mixtral import LAYERS

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(why_no_gpu() is not None, reason=why_no_gpu() or ""),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
    pytest.mark.filterwarnings("ignore"),
]
OPTIONS = VllmOptions(
    dtype="float32",
    max_model_len=512,
    kv_cache_bytes=256 * 1024**2,
    max_num_seqs=8,
    moe_backend="triton",
)
# Triton's products of float32 are made of 10 bits of each factor.
_NEAR = 0.05
_MOST_OTHERS = 0.05


class Seeing(SwappingVllmEngine):
    """The engine itself, with a worker that writes down what its routers chose."""

    def __init__(
        self,
        options: VllmOptions,
        first: str,
        weights: Mapping[str, Weights],
        canaries: dict[str, Canary],
    ) -> None:
        super().__init__(
            first, weights, options, on_cpu=False, canary_interval=5, canaries=canaries
        )

    def _launch_settings(self) -> Any:
        settings = super()._launch_settings()
        assert settings.worker_cls == "service.engine.vllm.worker.gpu_worker.GraphSteeringWorker"
        settings.additional_config[RECORD_CHOICES_KEY] = True
        settings.worker_extension_cls = "tests.support.engine.gate_observer.SeeingExtension"
        return settings


@pytest.mark.parametrize("eager", [True, False])
async def test_steered_gpu_engine_equals_the_reference(eager: bool, tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"enforce_eager": eager})
    steering = await asyncio.to_thread(Steering, tmp_path, lambda *given: Seeing(options, *given))
    try:
        await steering.engine.start()
        answers = {"plain": await steering.say("plain")}
        for name in (*RULES, "half"):
            await steering.engine.load_to_host(name)
            assert await steering.go_to(name) == "steer"
            answers[name] = await steering.say(name)
        assert len({repr(answer) for answer in answers.values()}) == len(answers)
        for name, (tokens, logprobs) in answers.items():
            await steering.go_to(name)
            whole = [*PROMPT, *tokens[:-1]]
            await greedy(steering.engine, name, whole, 1)
            seen = await steering.engine.worker_rpc("coe_seen", len(whole))
            expected, chosen = await asyncio.to_thread(
                steering.reference.weigh, PROMPT, tokens, steering.profiles.get(name)
            )
            assert max(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) < _NEAR, name
            rows = [
                sorted(set(seen[layer][i])) == sorted(chosen[layer][i])
                for layer in range(LAYERS)
                for i in range(len(whole))
            ]
            # Where two experts are as good as equally probable, either may be chosen.
            assert rows.count(False) <= _MOST_OTHERS * len(rows), name
        # Bit for bit what they were, in any order, whatever ran before.
        for name in [*answers, *reversed(answers), "plain"]:
            await steering.go_to(name)
            assert await steering.say(name) == answers[name], name
    finally:
        await steering.engine.stop()
