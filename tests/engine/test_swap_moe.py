"""Mixture-of-experts models in the shared slot: whole models are exchanged, so nothing is repacked.

vLLM's own reload writes into packed weights and corrupts them without a word.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from service.engine.vllm import VllmEngine, VllmModel
from service.engine.vllm_swap import Weights
from tests.engine.real import BASE, ENVIRONMENT, OPTIONS, Swapping, ask

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM's and torch's own.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
]

# vLLM's CPU kernels want multiples of 32.
HIDDEN, INNER, LAYERS, HEADS, EXPERTS, WORDS = 128, 96, 2, 4, 4, 49152


def _mixtral(folder: Path, seed: int) -> str:
    """A tiny random Mixtral with the base's tokenizer."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": WORDS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    chance = torch.Generator().manual_seed(seed)

    def matrix(out: int, into: int) -> torch.Tensor:
        return torch.randn(out, into, generator=chance) * into**-0.5

    weights = {
        "model.embed_tokens.weight": torch.randn(WORDS, HIDDEN, generator=chance),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": matrix(WORDS, HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
            f"{layer}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(HIDDEN // 2, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.block_sparse_moe.gate.weight": matrix(EXPERTS, HIDDEN),
        }
        for k in range(EXPERTS):
            expert = f"{layer}.block_sparse_moe.experts.{k}"
            weights |= {
                f"{expert}.w1.weight": matrix(INNER, HIDDEN),
                f"{expert}.w2.weight": matrix(HIDDEN, INNER),
                f"{expert}.w3.weight": matrix(INNER, HIDDEN),
            }
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


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
        name: await asyncio.to_thread(_mixtral, root / name, seed)
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


async def test_an_exchanged_moe_is_right_and_the_canary_sees_a_reloaded_one(pair: Pair) -> None:
    canaries: dict[str, str] = {}
    weights = {name: Weights(folder) for name, folder in pair.folders.items()}
    engine = Swapping("one", weights, canaries)
    try:
        await engine.start()
        first = await ask(engine, "one")
        assert first != pair.said["two"]
        await engine.fill("two")
        for _ in range(3):
            assert (await engine.exchange("two")).ok
            assert await ask(engine, "two") == pair.said["two"]
            assert (await engine.exchange("one")).ok
            assert await ask(engine, "one") == first
        # vLLM's own way of putting other weights into a running engine.
        await engine._llm.pause_generation(mode="wait", clear_cache=True)
        path = {"weights_path": pair.folders["one"]}
        await engine._llm.collective_rpc("reload_weights", kwargs=path)
        await engine._llm.resume_generation()
        same = await ask(engine, "one") == first
        assert await engine._canary("one") is same
        assert not same, "vLLM reloads MoE weights rightly now: say so in the design"
    finally:
        await engine.stop()
