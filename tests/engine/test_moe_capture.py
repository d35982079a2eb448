"""Captured gate choices of vLLM equal those of transformers' eager model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from service.config import Config, MoeCapture
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights
from service.moe.steering_profile import LayerSteering, SteeringProfile, moe_shape, write_profile
from service.moe.virtual_expert_profiles import steering_of
from tests.support.engine.real_engines import (
    ENVIRONMENT,
    ON_ONE_ENGINE,
    OPTIONS,
    greedy,
    metric_values,
)
from tests.support.engine.routing_sample_recorder import Watch
from tests.support.engine.steering_reference import Reference
from tests.support.engine.tiny_mixtral import EXPERTS, LAYERS, mixtral

pytestmark = ON_ONE_ENGINE
_CAPTURE = MoeCapture(every=1, stretches=2, tokens=40)
# Tokens of the prompts: short, and long enough to be kept, and longer than what is kept.
_LENGTHS = (9, 36, 70)


@dataclass
class Slot:
    """An engine with two mixtures of experts and a steered one; what each was asked and said."""

    engine: SwappingVllmEngine
    folders: dict[str, str]
    watch: Watch
    profiles: dict[str, SteeringProfile]
    texts: dict[str, list[list[int]]] = field(default_factory=dict)

    async def ask(self, expert: str, prompt: list[int], tokens: int = 8) -> None:
        answer = (await greedy(self.engine, expert, prompt, tokens))["token_ids"]
        # The last token is sampled, and never routed.
        self.texts.setdefault(expert, []).append([*prompt, *answer[:-1]])

    async def look(self) -> None:
        assert self.engine._routing_stats is not None
        await self.engine._routing_stats.poll()


def profile_of(folder: str) -> SteeringProfile:
    """Never the first expert in layer 0, and in layer 1 one expert where the gate is sure."""
    shape = moe_shape(folder)
    assert shape is not None
    rules = {
        0: LayerSteering.of(EXPERTS, mask=[True, False, False, False]),
        1: LayerSteering.of(EXPERTS, top_p=0.6),
    }
    return SteeringProfile(shape, rules)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slot(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slot]:
    os.environ.update(ENVIRONMENT)
    root = tmp_path_factory.mktemp("captured")
    folders = {
        name: await asyncio.to_thread(mixtral, root / name, seed)
        for seed, name in enumerate(("one", "two"))
    }
    weights = {name: Weights(folder) for name, folder in folders.items()}
    profiles = {"sure": profile_of(folders["one"])}
    config = Config.model_validate(
        {
            "experts": {
                "one": {"model": folders["one"]},
                "sure": {"base": "one", "profile": str(root / "sure.safetensors")},
            },
            "pools": {"p": {"engine": "simulated"}},
        }
    )
    write_profile(profiles["sure"], root / "sure.safetensors")
    folders["sure"] = folders["one"]
    steering = steering_of(config, "sure", Path(folders["one"]))
    weights["sure"] = Weights(folders["one"], steering=steering)
    watch = Watch(_CAPTURE)
    engine = SwappingVllmEngine(
        "one",
        weights,
        OPTIONS.model_copy(update={"moe_capture": _CAPTURE}),
        on_cpu=True,
        canary_interval=1,
        canaries={},
        observer=watch,
    )
    try:
        await engine.start()
        await engine.load_to_host("two")
        await engine.load_to_host("sure")
        yield Slot(engine, folders, watch, profiles)
    finally:
        await engine.stop()


def chosen_for(slot: Slot, expert: str) -> list[list[list[set[int]]]]:
    """By transformers' eager model: for each text, layer and token the experts chosen."""
    reference = Reference(slot.folders[expert])
    found = []
    for text in slot.texts[expert]:
        _, chosen = reference.say(text, 1, slot.profiles.get(expert))
        found.append([[set(row) for row in chosen[layer]] for layer in range(LAYERS)])
    return found


async def test_capture_counts_equal_the_reference_per_expert(slot: Slot) -> None:
    chance = np.random.default_rng(0)
    for expert in ("one", "two", "sure", "one"):
        if slot.texts:
            # With the canary's tokens each time: they are not counted.
            assert (await slot.engine.swap_in(expert)).ok
        prompts = [chance.integers(1000, 40_000, n).tolist() for n in _LENGTHS]
        await asyncio.gather(*(slot.ask(expert, prompt) for prompt in prompts))
    await slot.look()
    for expert in slot.folders:
        texts = await asyncio.to_thread(chosen_for, slot, expert)
        load = [
            [sum(e in row for text in texts for row in text[layer]) for e in range(EXPERTS)]
            for layer in range(LAYERS)
        ]
        assert slot.watch.load(expert).tolist() == load
        if expert == "sure":
            assert load[0][0] == 0
            assert sum(load[1]) < 2 * sum(map(len, slot.texts[expert]))
        kept = [
            stretch
            for sample in slot.watch.told
            if sample.expert == expert
            for stretch in sample.stretches
        ]
        assert len(kept) == _CAPTURE.stretches
        # Of the 36 tokens all, of the 70 the first 40.
        assert {stretch.shape[1] for stretch in kept} <= {36, 40}
        for stretch in kept:
            rows = [[{e for e in row if e >= 0} for row in layer] for layer in stretch.tolist()]
            assert any(rows == [layer[: len(rows[0])] for layer in text] for text in texts)


async def test_capture_reaches_the_pool_s_statistics(slot: Slot) -> None:
    sums = await slot.watch.routing_stats("two")
    assert sums["tokens"] == sum(map(len, slot.texts["two"]))
    assert (sums["layers"], sums["experts"], sums["top_k"]) == ([0, 1], EXPERTS, 2)
    metrics = await metric_values(slot.watch)
    assert metrics["coe_moe_tokens_total", "two"] == sums["tokens"]
    assert 1 <= metrics["coe_moe_imbalance_ratio", "two"] <= EXPERTS
    assert 0 < metrics["coe_moe_segment_routing_ratio", "one"] <= 1


async def test_capture_last_sample_is_reported_at_stop(slot: Slot) -> None:
    before = slot.watch.load("one").sum()
    await slot.ask("one", list(range(500, 520)), tokens=1)
    await slot.engine.stop()
    assert slot.watch.load("one").sum() == before + 20 * 2 * LAYERS
