"""The extension of a GPU's workers, and what tests ask of it."""

from __future__ import annotations

import torch

from service.engine.vllm.worker.gate_choice_recorder import ChoiceBuffer
from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension


class SeeingExtension(PinnedExtension):
    """What a test asks of it."""

    def coe_seen(self, tokens: int) -> dict[int, list[list[int]]]:
        """By layer, what was chosen for the first so many tokens of the last step."""
        buffer = self._coe_choices
        assert isinstance(buffer, ChoiceBuffer)
        return {
            layer.layer: buffer.chosen[:tokens, place].tolist()
            for place, layer in enumerate(buffer.layers)
        }

    def coe_compiled(self) -> int:
        """How many graphs were compiled so far."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
