"""A tiny random Mixtral, as a folder with the base's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadtests.moe.random_mixtral import MixtralShape, write_mixtral
from tests.support.engine.real_engines import BASE

LAYERS, EXPERTS = 2, 4
# vLLM's CPU kernels want multiples of 32.
SHAPE = MixtralShape(
    LAYERS,
    EXPERTS,
    top_k=2,
    hidden=128,
    inner=96,
    heads=4,
    kv_heads=2,
    context=1024,
    embedding=1.0,
)


def mixtral(folder: Path, seed: int) -> str:
    """A tiny random Mixtral with the base's tokenizer."""
    import torch

    chance = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int, scale: float) -> Any:
        return (torch.randn(rows, columns, generator=chance) * scale).numpy()

    return str(write_mixtral(folder, Path(BASE), SHAPE, draw))
