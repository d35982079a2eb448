"""A tiny random Mixtral, as a folder with the base's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.engine.real import BASE

# vLLM's CPU kernels want multiples of 32.
HIDDEN, INNER, LAYERS, HEADS, EXPERTS, WORDS = 128, 96, 2, 4, 4, 49152


def mixtral(folder: Path, seed: int) -> str:
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
