"""What routers of a real engine choose, held against transformers' eager model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import pytest_asyncio

from service.config import MoeCapture
from service.engine.protocol import Chosen, EngineRequest, Message
from service.engine.vllm_swap import SwappingVllmEngine, Weights
from service.telemetry.pool_metrics import PoolMetrics
from tests.engine.mixtral import EXPERTS, LAYERS, mixtral
from tests.engine.real import BASE, ENVIRONMENT, OPTIONS, told

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's and torch's own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
]
_CAPTURE = MoeCapture(every=1, stretches=2, tokens=40)
# Tokens of the prompts: short, and long enough to be kept, and longer than what is kept.
_LENGTHS = (9, 36, 70)


class Watch(PoolMetrics):
    """The pool's own, which remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(_CAPTURE)
        self.told: list[Chosen] = []

    def chosen(self, chosen: Chosen) -> None:
        super().chosen(chosen)
        self.told.append(chosen)

    def load(self, expert: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        loads = [one.load for one in self.told if one.expert == expert and one.load is not None]
        return np.sum(loads, axis=0)


@dataclass
class Slot:
    """An engine with two mixtures of experts, and what each was asked and said, as token ids."""

    engine: SwappingVllmEngine
    folders: dict[str, str]
    watch: Watch
    texts: dict[str, list[list[int]]] = field(default_factory=dict)

    async def ask(self, expert: str, prompt: list[int], tokens: int = 8) -> None:
        body = {
            "model": expert,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))

        name = f"test-{expert}-{len(prompt)}-{prompt[0]}"
        await self.engine.run(
            EngineRequest("/v1/completions", expert, orjson.dumps(body), name), collect
        )
        answer = orjson.loads(b"".join(parts))["choices"][0]["token_ids"]
        # The last token is sampled, and never routed.
        self.texts.setdefault(expert, []).append([*prompt, *answer[:-1]])

    async def look(self) -> None:
        assert self.engine._routers is not None
        await self.engine._routers.look()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def slot(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slot]:
    os.environ.update(ENVIRONMENT)
    root = tmp_path_factory.mktemp("captured")
    folders = {
        name: await asyncio.to_thread(mixtral, root / name, seed)
        for seed, name in enumerate(("one", "two"))
    }
    watch = Watch()
    engine = SwappingVllmEngine(
        "one",
        {name: Weights(folder) for name, folder in folders.items()},
        OPTIONS.model_copy(update={"moe_capture": _CAPTURE}),
        on_cpu=True,
        canary_every=1,
        canaries={},
        watch=watch,
    )
    try:
        await engine.start()
        await engine.fill("two")
        yield Slot(engine, folders, watch)
    finally:
        await engine.stop()


def choices_of(folder: str, texts: list[list[int]]) -> list[Any]:
    """What transformers' eager model routes, text by text: (layers, tokens, k), sorted."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    found = []
    with torch.no_grad():
        for text in texts:
            logits = model(torch.tensor([text]), output_router_logits=True).router_logits
            found.append(torch.stack([one.topk(2).indices.sort().values for one in logits]).numpy())
    return found


async def test_counts_are_the_references_by_expert_name(slot: Slot) -> None:
    chance = np.random.default_rng(0)
    for expert in ("one", "two", "one"):
        if expert != slot.engine._stats.running:  # type: ignore[union-attr]
            # With the canary's tokens each time: they are not counted.
            assert (await slot.engine.exchange(expert)).ok
        prompts = [chance.integers(1000, 40_000, n).tolist() for n in _LENGTHS]
        await asyncio.gather(*(slot.ask(expert, prompt) for prompt in prompts))
    await slot.look()
    for expert, folder in slot.folders.items():
        expected = await asyncio.to_thread(choices_of, folder, slot.texts[expert])
        load = sum(
            np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in text])
            for text in expected
        )
        assert slot.watch.load(expert).tolist() == load.tolist()
        kept = [one for told in slot.watch.told if told.expert == expert for one in told.stretches]
        assert len(kept) == _CAPTURE.stretches
        for one in kept:
            assert one.shape[0] == LAYERS
            found = np.sort(one, axis=2)
            # Of the 36 tokens all, of the 70 the first 40.
            assert any(np.array_equal(found, text[:, : one.shape[1]]) for text in expected)
        assert {one.shape[1] for one in kept} <= {36, 40}


async def test_the_pool_tells_it(slot: Slot) -> None:
    sums = await slot.watch.routes_of("two")
    assert sums["tokens"] == sum(map(len, slot.texts["two"]))
    assert (sums["layers"], sums["experts"], sums["top_k"]) == ([0, 1], EXPERTS, 2)
    metrics = await told(slot.watch)
    assert metrics["coe_moe_tokens_total", "two"] == sums["tokens"]
    assert 1 <= metrics["coe_moe_imbalance_ratio", "two"] <= EXPERTS
    assert 0 < metrics["coe_moe_srp_ratio", "one"] <= 1


async def test_what_was_seen_last_is_told_at_the_end(slot: Slot) -> None:
    before = slot.watch.load("one").sum()
    await slot.ask("one", list(range(500, 520)), tokens=1)
    await slot.engine.stop()
    assert slot.watch.load("one").sum() == before + 20 * 2 * LAYERS
