"""Random Mixtrals: what they say is noise, what they cost is real."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from service.config import VllmOptions
from service.models import locate

_BASE = "smollm2-135m-instruct"
_SEED = 1

# Of so many rows and columns: normally distributed, times the third.
Draw = Callable[[int, int, float], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class MixtralShape:
    """The sizes of a Mixtral. `embedding`: standard deviation of its embeddings."""

    layers: int
    experts: int
    top_k: int
    hidden: int = 576
    inner: int = 1536
    heads: int = 9
    kv_heads: int = 3
    words: int = 49152
    context: int = 2048
    embedding: float = 576**-0.5


def random_mixtral(folder: Path, *, layers: int, experts: int, top_k: int) -> Path:
    """Write one with layers of the demo's size into a new folder, float32.

    Raises RuntimeError where the tokenizer is not here.
    """
    base = locate(_BASE)
    if base is None:
        raise RuntimeError(f"{_BASE} is not here yet; get it with: coe models pull {_BASE}")
    chance = np.random.default_rng(_SEED)

    def draw(rows: int, columns: int, scale: float) -> NDArray[np.float32]:
        return chance.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    return write_mixtral(folder, base, MixtralShape(layers, experts, top_k), draw)


def write_mixtral(folder: Path, base: Path, shape: MixtralShape, draw: Draw) -> Path:
    """Write one into a new folder, with the tokenizer in `base`; `draw` makes every matrix."""
    ignored = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(base, folder, ignore=ignored)
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "vocab_size": shape.words,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(shape, draw), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(shape: MixtralShape, draw: Draw) -> dict[str, NDArray[np.float32]]:
    hidden, inner = shape.hidden, shape.inner

    def matrix(out: int, into: int) -> NDArray[np.float32]:
        return draw(out, into, into**-0.5)

    ones = np.ones(hidden, np.float32)
    key = hidden // shape.heads * shape.kv_heads
    weights = {
        "model.embed_tokens.weight": draw(shape.words, hidden, shape.embedding),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(shape.words, hidden),
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        weights |= {
            f"{layer}.input_layernorm.weight": ones,
            f"{layer}.post_attention_layernorm.weight": ones,
            f"{layer}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(key, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(key, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{layer}.block_sparse_moe.gate.weight": matrix(shape.experts, hidden),
        }
        for k in range(shape.experts):
            expert = f"{layer}.block_sparse_moe.experts.{k}"
            weights |= {
                f"{expert}.w1.weight": matrix(inner, hidden),
                f"{expert}.w2.weight": matrix(hidden, inner),
                f"{expert}.w3.weight": matrix(inner, hidden),
            }
    return weights


def given_or_random(
    model: Path | None, scratch: Path, *, layers: int, experts: int, top_k: int
) -> Path:
    """Return the folder of the mixture to measure: `model`, or a random one below `scratch`."""
    if model is not None:
        return model
    folder = scratch / "model"
    random_mixtral(folder, layers=layers, experts=experts, top_k=top_k)
    return folder


def engine_options(in_flight: int) -> VllmOptions:
    """The options of the engines that are measured, for so many requests at once."""
    return VllmOptions(
        dtype="float32",
        max_model_len=512,
        kv_cache_bytes=256 * 1024**2,
        max_num_seqs=in_flight,
        enforce_eager=True,
    )
