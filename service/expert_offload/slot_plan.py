"""How many slots the routed experts of a model get within a bound, and the memory of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.models.model_inspection import ModelInfo

_ROUTED = ".experts."


@dataclass(frozen=True, slots=True)
class OffloadPlan:
    """The planned memory of a mixture in bytes.

    Attributes:
        layers: The number of layers with routed experts.
        experts: The number of routed experts of each layer.
        slots: The slots of each layer.
        expert_bytes: The bytes of one expert of one layer.
        other_bytes: The bytes of all weights but the routed experts.
    """

    layers: int
    experts: int
    slots: int
    expert_bytes: int
    other_bytes: int

    @property
    def slot_bytes(self) -> int:
        """The bytes of all slots."""
        return self.layers * self.slots * self.expert_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes of routed experts that are in memory at the same time.

        While the checkpoint is packed these are the experts of one layer, and then the slots with
        those of the layer that is made ready for the kernel.
        """
        return max(
            self.experts * self.expert_bytes, self.slot_bytes + self.slots * self.expert_bytes
        )


def plan_offload(
    info: ModelInfo, bound_bytes: int, *, weight_bytes: int, element_bytes: int
) -> OffloadPlan:
    """Plan the slots of a mixture.

    Args:
        info: The mixture.
        bound_bytes: The bytes of all slots.
        weight_bytes: The bytes of all weights in memory.
        element_bytes: The bytes of one weight in memory.

    Raises:
        ValueError: The experts can't be held in slots, or the bound is too small.
    """
    if info.quantization is not None:
        raise ValueError(
            f"its weights are quantised ({info.quantization}); allowed are weights that are not"
        )
    routed = {name: shape for name, shape in info.shapes.items() if _ROUTED in name}
    layers = len({name.partition(_ROUTED)[0] for name in routed})
    if info.moe is None or not layers:
        raise ValueError("it has no routed experts whose weights are found by their names")
    if any(name.endswith("bias") for name in routed):
        raise ValueError("its routed experts have biases; allowed are experts without")
    total = sum(map(math.prod, routed.values())) * element_bytes
    expert_bytes = total // (layers * info.moe.experts)
    slots = slots_for(bound_bytes, layers, info.moe.experts, expert_bytes)
    return OffloadPlan(layers, info.moe.experts, slots, expert_bytes, weight_bytes - total)


def slots_for(bound_bytes: int, layers: int, experts: int, expert_bytes: int) -> int:
    """Return how many slots each layer gets within a bound.

    Args:
        bound_bytes: The bytes of all slots of all layers.
        layers: The number of layers with routed experts.
        experts: The number of routed experts of each layer.
        expert_bytes: The bytes of one expert of one layer.

    Raises:
        ValueError: The bound is too small for one slot in each layer.
    """
    slots = bound_bytes // (layers * expert_bytes)
    if slots < 1:
        raise ValueError(
            f"expert_offload.bytes is {bound_bytes}, and one slot in each of the {layers} layers "
            f"takes {layers * expert_bytes}; allowed is that or more"
        )
    return min(slots, experts)
