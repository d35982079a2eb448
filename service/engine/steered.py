"""What an engine is told of a steered expert: its base, and what is changed layer by layer. Data.

The definition of what it does is `service.models.steering.steer`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SteeredLayer:
    """One decoder layer's gate: see `service.models.steering.LayerSteering`."""

    layer: int
    mask: tuple[bool, ...]
    bias: tuple[float, ...]
    boost: tuple[float, ...]
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class Steering:
    """A steered expert. `experts`, `top_k`, `renormalize`: what its base's gates must be like."""

    base: str
    experts: int
    top_k: int
    renormalize: bool
    layers: tuple[SteeredLayer, ...]
