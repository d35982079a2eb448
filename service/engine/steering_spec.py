"""What an engine is told of a steered expert: its base, and what is changed layer by layer. Data.

The definition of what it does is `service.moe.steering.steer`.
"""

from __future__ import annotations

from dataclasses import dataclass

# The key of vLLM's `additional_config` that tells a worker whose routers have standing rules how
# many experts for a token they are made for.
PLACES_KEY = "coe_places"
# The one that tells a worker which adapter to merge into the weights that it loads.
MERGED_KEY = "coe_merged"
# The one that tells a worker to have its routers write down what they choose.
RECORD_CHOICES_KEY = "coe_record_choices"


@dataclass(frozen=True, slots=True)
class SteeredLayer:
    """One decoder layer's gate: see `service.moe.steering.LayerSteering`."""

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

    @property
    def places(self) -> int:
        """The most experts that are chosen for a token in any layer."""
        return max([self.top_k, *(layer.top_k or 0 for layer in self.layers)])
