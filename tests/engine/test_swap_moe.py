"""Mixture-of-experts models in the shared slot: whole models are exchanged, so nothing is repacked.

vLLM's own reload writes into packed weights and corrupts them without a word.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import Canary, Weights
from tests.support.engine.real_engines import ENVIRONMENT, ON_ONE_ENGINE, OPTIONS, Swapping, ask
from tests.support.engine.tiny_mixtral import mixtral

pytestmark = ON_ONE_ENGINE


@dataclass
class Pair:
    """Two models of one family, and what each says on an engine of its own."""

    folders: dict[str, str]
    said: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    os.environ.update(ENVIRONMENT)
    root = tmp_path_factory.mktemp("mixtral")
    folders = {
        name: await asyncio.to_thread(mixtral, root / name, seed)
        for seed, name in enumerate(("one", "two"))
    }
    pair = Pair(folders, {})
    fresh = VllmEngine(VllmModel("two", folders["two"], {}), OPTIONS, on_cpu=True)
    try:
        await fresh.start()
        pair.said["two"] = await ask(fresh, "two")
    finally:
        await fresh.stop()
    yield pair


async def test_swap_of_moe_models_is_exact_and_the_canary_detects_reloads(pair: Pair) -> None:
    canaries: dict[str, Canary] = {}
    weights = {name: Weights(folder) for name, folder in pair.folders.items()}
    engine = Swapping("one", weights, canaries)
    try:
        await engine.start()
        first = await ask(engine, "one")
        assert first != pair.said["two"]
        await engine.load_to_host("two")
        for _ in range(3):
            assert (await engine.swap_in("two")).ok
            assert await ask(engine, "two") == pair.said["two"]
            assert (await engine.swap_in("one")).ok
            assert await ask(engine, "one") == first
        # vLLM's own way of putting other weights into a running engine.
        await engine.vllm.pause()
        await engine.vllm.collective_rpc("reload_weights", weights_path=pair.folders["one"])
        await engine.vllm.resume()
        same = await ask(engine, "one") == first
        assert await engine.check_canary("one") is same
        assert not same, "vLLM reloads MoE weights rightly now: say so in the design"
    finally:
        await engine.stop()
