"""A random Mixtral with layers of the demo's size: what it says is noise, what it costs is real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from service.models import locate

_BASE = "smollm2-135m-instruct"
HIDDEN, INNER, HEADS, KV_HEADS, WORDS = 576, 1536, 9, 3, 49152
_SEED = 1


def random_mixtral(folder: Path, *, layers: int, experts: int, top_k: int) -> Path:
    """Write one into a new folder, float32. Raises RuntimeError where the tokenizer is not here."""
    base = locate(_BASE)
    if base is None:
        raise RuntimeError(f"{_BASE} is not here yet; get it with: coe models pull {_BASE}")
    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(base, folder, ignore=ignored)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "vocab_size": WORDS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(layers, experts), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(layers: int, experts: int) -> dict[str, NDArray[np.float32]]:
    chance = np.random.default_rng(_SEED)

    def matrix(out: int, into: int) -> NDArray[np.float32]:
        return chance.standard_normal((out, into), dtype=np.float32) * np.float32(into**-0.5)

    ones = np.ones(HIDDEN, np.float32)
    key = HIDDEN // HEADS * KV_HEADS
    weights = {
        "model.embed_tokens.weight": matrix(WORDS, HIDDEN),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(WORDS, HIDDEN),
    }
    for i in range(layers):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": ones,
            f"{layer}.post_attention_layernorm.weight": ones,
            f"{layer}.self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": matrix(key, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": matrix(key, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.block_sparse_moe.gate.weight": matrix(experts, HIDDEN),
        }
        for k in range(experts):
            expert = f"{layer}.block_sparse_moe.experts.{k}"
            weights |= {
                f"{expert}.w1.weight": matrix(INNER, HIDDEN),
                f"{expert}.w2.weight": matrix(HIDDEN, INNER),
                f"{expert}.w3.weight": matrix(INNER, HIDDEN),
            }
    return weights
