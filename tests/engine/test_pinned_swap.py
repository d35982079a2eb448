"""Swaps by copies into live parameters, as on a GPU, in vLLM on a CPU: compiled, and one engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.engine.shared_weight_cache import EngineShare, SharedWeightCache
from service.engine.vllm.swapping_engine import Weights
from service.errors import EngineDeadError, EngineRestartingError, ExpertFailedError
from tests.support import tiny_dense_family
from tests.support.engine.real_engines import ENVIRONMENT, ON_ONE_ENGINE, Swapping, greedy

pytestmark = ON_ONE_ENGINE
_PROMPT = [(7 * i) % 250 for i in range(24)]
_TOKENS = 8
# vLLM's own tests' way to have a model traced on CPU without waiting for a compiler.
_TRACED = "VLLM_CPU_CI_ENV"


class Pinned(Swapping):
    """Started as on a GPU, but for the worker."""

    def __init__(self, weights: dict[str, Weights], cache: SharedWeightCache) -> None:
        super().__init__("one", weights, {})
        self._uses_graph_steering = True
        self._share = EngineShare(cache)

    def _launch_settings(self) -> Any:
        settings = super()._launch_settings()
        settings.worker_cls = "tests.support.engine.plain_cpu_worker.PlainCpuWorker"
        settings.worker_extension_cls = (
            "tests.support.engine.failing_pinned_extension.FailingPinnedExtension"
        )
        settings.enforce_eager = False
        return settings

    async def say(self, expert: str) -> list[int]:
        choice = await greedy(self, expert, _PROMPT, _TOKENS)
        tokens: list[int] = choice["token_ids"]
        return tokens


def _untied(folder: Path, seed: int) -> Path:
    """A model with a head of its own. Tied random models only repeat their last token."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny_dense_family.base(folder, seed, tie_word_embeddings=False)
    file = folder / "model.safetensors"
    weights = load_file(file)
    shape = weights["model.embed_tokens.weight"].shape
    weights["lm_head.weight"] = torch.randn(
        shape, generator=torch.Generator().manual_seed(100 + seed)
    )
    save_file(weights, file, metadata={"format": "pt"})
    return folder


class Stage:
    """The engine, its experts' folders, and what transformers says of them."""

    def __init__(self, folder: Path) -> None:
        self.folders = {
            name: _untied(folder / name, seed) for seed, name in enumerate(("one", "two"))
        }
        self.cache = SharedWeightCache(None)
        weights = {name: Weights(str(path)) for name, path in self.folders.items()}
        self.engine = Pinned(weights, self.cache)
        self.expected = {name: self._reference(path) for name, path in self.folders.items()}

    @staticmethod
    def _reference(folder: Path) -> list[int]:
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        said = model.generate(
            torch.tensor([_PROMPT]),
            max_new_tokens=_TOKENS,
            min_new_tokens=_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        tokens: list[int] = said[0, len(_PROMPT) :].tolist()
        return tokens


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    os.environ.update(ENVIRONMENT)
    made = await asyncio.to_thread(Stage, tmp_path_factory.mktemp("pinned"))
    os.environ[_TRACED] = "1"
    try:
        report = await made.engine.start()
        assert report.details["eager"] == "false"
        await made.engine.worker_rpc("coe_pretend_cuda")
        assert not made.cache.sizes(), "an engine that never swaps writes nothing"
        await made.engine.load_to_host("two")
        assert len(made.cache.sizes()) == 2
        yield made
    finally:
        del os.environ[_TRACED]
        await made.engine.stop()
        made.cache.close()


async def test_pinned_swap_equals_the_reference_whatever_ran_before(stage: Stage) -> None:
    engine, expected = stage.engine, stage.expected
    assert expected["one"] != expected["two"]
    assert await engine.say("one") == expected["one"]
    compiled = await engine.worker_rpc("coe_compiled")
    assert compiled > 0
    for name in ("two", "one", "one", "two", "one"):
        done = await engine.swap_in(name)
        assert done.ok
        assert await engine.say(name) == expected[name]
    assert await engine.worker_rpc("coe_compiled") == compiled


async def test_pinned_swap_engine_answers_only_for_the_expert_in_its_model(stage: Stage) -> None:
    assert (await stage.engine.swap_in("one")).ok
    with pytest.raises(EngineRestartingError, match="'two' are not in the model"):
        await stage.engine.say("two")


@pytest.mark.parametrize("after", [0, 3, -1])
async def test_pinned_swap_that_fails_half_way_leaves_the_old_expert(
    stage: Stage, after: int
) -> None:
    engine = stage.engine
    assert (await engine.swap_in("one")).ok
    after %= await engine.worker_rpc("coe_tensors")
    await engine.worker_rpc("coe_fail_copies", after, 1)
    with pytest.raises(ExpertFailedError, match="could not be swapped in: RuntimeError: CUDA"):
        await engine.swap_in("two")
    assert engine.failure() is None
    assert await engine.say("one") == stage.expected["one"]
    assert (await engine.swap_in("two")).ok
    assert await engine.say("two") == stage.expected["two"]


async def test_pinned_swap_that_can_not_be_undone_breaks_the_engine(stage: Stage) -> None:
    """Last: the engine answers nothing afterwards."""
    engine = stage.engine
    assert (await engine.swap_in("one")).ok
    await engine.worker_rpc("coe_fail_copies", 3, 999)
    with pytest.raises(EngineDeadError):
        await engine.swap_in("two")
    assert engine.failure() == "a swap was left half done"
    for name in ("one", "two"):
        with pytest.raises(EngineRestartingError):
            await engine.say(name)
