"""The plain data of a steered expert for an engine: its base, and the changes of each layer.

`service.moe.steering_profile.steer` defines the effect.
"""

from __future__ import annotations

from dataclasses import dataclass

# These are keys of vLLM's `additional_config`, which vLLM passes to the worker.
# The most routed experts that a profile chooses for a token. The worker then installs rules.
PLACES_KEY = "coe_places"
# The adapter that the worker merges into the weights while it loads them.
MERGED_KEY = "coe_merged"
# Whether the routers record their choices.
RECORD_CHOICES_KEY = "coe_record_choices"
# The slots for routed experts that do not all fit.
OFFLOAD_KEY = "coe_expert_offload"


@dataclass(frozen=True, slots=True)
class SteeredLayer:
    """One decoder layer's changed gate, as in `service.moe.steering_profile.LayerSteering`."""

    layer: int
    mask: tuple[bool, ...]
    bias: tuple[float, ...]
    boost: tuple[float, ...]
    top_k: int | None = None
    top_p: float | None = None
    null: float | None = None


@dataclass(frozen=True, slots=True)
class Steering:
    """A steered expert.

    Attributes:
        base: The expert whose weights it runs on.
        experts: The number of routed experts that each gate of the base must have.
        top_k: The number of routed experts that the base must choose for a token.
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
