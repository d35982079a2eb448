"""Finds the gates of a mixture-of-experts model: layers, shapes, and the rule of choice.

It reads `config.json`, the headers of the safetensors files and the gates' own bytes. It reads no
other weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.safetensors_headers import TensorInfo, read_header

# Mixtral, Qwen2/3-MoE, OLMoE and others have `mlp.gate`. Granite has
# `block_sparse_moe.router.layer`.
_GATE = re.compile(
    r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)(?:\.layer)?\.weight$"
)
# Models whose gates choose by softmax and top-k, and whether they normalise the weights of chosen
# experts. None means that `norm_topk_prob` in config.json decides.
STEERABLE: dict[str, bool | None] = {
    "mixtral": True,
    "granitemoe": True,
    "olmoe": False,
    "qwen2_moe": None,
    "qwen3_moe": None,
}


@dataclass(frozen=True, slots=True)
class MoeShape:
    """The gates of a model, which a steering profile has to fit.

    Attributes:
        layers: The indices of the decoder layers with a gate.
        experts: The number of routed experts of each layer.
        top_k: The number of routed experts per token.
        renormalize: Whether the weights of the chosen experts sum to 1.
        gates: The SHA-256 in hex over the gates' stored weights, layer by layer. It identifies the
            base.
    """

    layers: tuple[int, ...]
    experts: int
    top_k: int
    renormalize: bool
    gates: str


def moe_shape(folder: Path | str) -> MoeShape | None:
    """Return a model's gates, or None if it has none.

    Raises:
        ModelStoreError: The model is invalid.
    """
    folder = Path(folder)
    sizes = _sizes(folder)
    found: dict[int, tuple[Path, TensorInfo]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if (match := _GATE.search(name)) is not None and len(tensor.shape) == 2:
                found[int(match[1])] = (file, tensor)
    if not found:
        return None
    top_k = sizes.get("num_experts_per_tok", sizes.get("num_experts_per_token"))
    if not isinstance(top_k, int) or top_k < 1:
        raise ModelStoreError(f"{folder / 'config.json'}: 'num_experts_per_tok' is missing")
    layers = tuple(sorted(found))
    counts = {layer: found[layer][1].shape[0] for layer in layers}
    experts = counts[layers[0]]
    odd = next((layer for layer in layers if counts[layer] != experts), None)
    if odd is not None:
        raise ModelStoreError(
            f"{folder}: layer {odd} has {counts[odd]} experts and layer {layers[0]} {experts}"
        )
    digest = hashlib.sha256()
    for layer in layers:
        file, tensor = found[layer]
        digest.update(f"{layer} {tensor.dtype} {tensor.shape}\n".encode())
        with file.open("rb") as data:
            data.seek(tensor.begin)
            digest.update(data.read(tensor.data_bytes))
    return MoeShape(layers, experts, top_k, _renormalizes(sizes), digest.hexdigest())


def why_not_steerable(folder: Path | str) -> str | None:
    """Return why a model's gates can't be steered, or None if they can."""
    kind = _sizes(Path(folder)).get("model_type")
    if kind in STEERABLE:
        return None
    return (
        f"its gates are of type {kind!r}; those that can be steered choose by softmax and top-k: "
        f"{', '.join(sorted(STEERABLE))}"
    )


def _renormalizes(sizes: dict[str, Any]) -> bool:
    known = STEERABLE.get(str(sizes.get("model_type")))
    return bool(sizes.get("norm_topk_prob", False)) if known is None else known


def _sizes(folder: Path) -> dict[str, Any]:
    where = folder / "config.json"
    try:
        config = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelStoreError(f"{where}: can't be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelStoreError(f"{where}: must hold a JSON object")
    return config
