"""The folder of a mixture: a standard Mixtral with a shared file and a file for each expert.

Engines find the tensors by the index. The gates are in the shared file, so that another expert adds
one file and rewrites only the shared file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from router_models.moe import gate_fit
from router_models.moe.dense_reader import BASE_CONFIG, STATISTICS, Dense, ffn_name
from router_models.moe.gate_fit import Statistics

SHARED = "shared.safetensors"
_INDEX = "model.safetensors.index.json"
# The files with the tokenizer, the chat template and the generation defaults.
_FACE_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
_KEPT_KEYS = (
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings",
    "use_cache", "vocab_size",
)  # fmt: skip


def mixtral_config(base: Mapping[str, Any], *, experts: int, top_k: int) -> dict[str, Any]:
    """Build the mixture's config.json. Keys that both architectures share keep their values."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "sliding_window": None,
        **{key: base[key] for key in _KEPT_KEYS if key in base},
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "dtype": base.get("dtype", base.get("torch_dtype", "float32")),
    }


def write_shared(
    folder: Path, shared: Mapping[str, torch.Tensor], weights: NDArray[np.float32]
) -> None:
    """Write attention, embeddings, norms, and the gates (L, E, H) in the same dtype."""
    dtype = next(iter(shared.values())).dtype
    gate = {
        f"model.layers.{layer}.block_sparse_moe.gate.weight": torch.from_numpy(weight).to(dtype)
        for layer, weight in enumerate(weights)
    }
    _save({**shared, **gate}, folder / SHARED)


def write_expert(folder: Path, index: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the FFNs of a dense model as expert `index`. Its other weights are ignored."""
    _save(
        {
            named: weight.contiguous()
            for name, weight in weights
            if (named := ffn_name(name, index)) is not None
        },
        folder / expert_file(index),
    )


def expert_file(index: int) -> str:
    """The name of the file with expert `index`."""
    return f"expert-{index:03}.safetensors"


def keep_experts(source: Path, folder: Path, count: int) -> None:
    """Link or copy the first `count` experts of another mixture."""
    for index in range(count):
        name = expert_file(index)
        try:
            os.link(source / name, folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def finish(
    folder: Path,
    base: Path,
    base_config: Mapping[str, Any],
    statistics: Statistics,
    *,
    top_k: int,
    card: str,
) -> None:
    """Write all other files: index, config, tokenizer, statistics and model card."""
    files = [SHARED, *(expert_file(i) for i in range(len(statistics.experts)))]
    placed: dict[str, str] = {}
    size = 0
    for name in files:
        with safe_open(str(folder / name), "pt") as file:
            placed.update(dict.fromkeys(file.keys(), name))
        size += (folder / name).stat().st_size
    _dump({"metadata": {"total_size": size}, "weight_map": placed}, folder / _INDEX)
    config = mixtral_config(base_config, experts=len(statistics.experts), top_k=top_k)
    _dump(config, folder / "config.json")
    for name in _FACE_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    (folder / STATISTICS).parent.mkdir()
    gate_fit.write(statistics, folder / STATISTICS)
    _dump(dict(base_config), folder / BASE_CONFIG)
    (folder / "README.md").write_text(card, encoding="utf-8")


def split(dense: Dense) -> dict[str, torch.Tensor]:
    """Return the base's tensors that all experts share: everything but its FFNs."""
    return {
        name: weight.contiguous() for name, weight in dense.weights() if ffn_name(name, 0) is None
    }


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates files that only the owner can read


def _dump(data: object, path: Path) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
