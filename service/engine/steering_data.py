"""A steered expert as an engine gets it: its base, and the changes layer by layer. Plain data.

`service.moe.steering.steer` defines the effect.
"""

from __future__ import annotations

from dataclasses import dataclass

# Keys of vLLM's `additional_config`, which reaches the worker.
# The most routed experts that a profile chooses for a token; rules for gates are installed.
PLACES_KEY = "coe_places"
# The adapter to merge into the weights while they are loaded.
MERGED_KEY = "coe_merged"
# The routers record their choices.
RECORD_CHOICES_KEY = "coe_record_choices"


@dataclass(frozen=True, slots=True)
class SteeredLayer:
    """The changes of one decoder layer's gate: see `service.moe.steering.LayerSteering`."""

    layer: int
    mask: tuple[bool, ...]
    bias: tuple[float, ...]
    boost: tuple[float, ...]
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True)
class Steering:
    """A steered expert.

    Attributes:
        base: The expert whose weights it has.
        experts: Routed experts that each gate of the base must have.
        top_k: How many of them a token must get without steering.
        renormalize: Whether the base must divide the weights of the chosen experts by their sum.
        layers: The changed layers.
    """

    base: str
    experts: int
    top_k: int
    renormalize: bool
    layers: tuple[SteeredLayer, ...]

    @property
    def places(self) -> int:
        """The most routed experts that any layer chooses for a token."""
        return max([self.top_k, *(layer.top_k or 0 for layer in self.layers)])
