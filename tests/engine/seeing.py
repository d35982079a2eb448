"""A worker with standing rules that also writes down, inside the graph, which experts it chose."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from service.engine.vllm_moe import routed_layers
from service.engine.vllm_pinned import PinnedExtension
from service.engine.vllm_standing import Stands

_TOKENS = 8192  # of a step, at most


def _write(seen: torch.Tensor, ids: torch.Tensor) -> None:
    seen[: ids.shape[0]].copy_(ids)


class Sees(Stands):
    """`seen`: by layer, what its router chose for each token of the last step."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Then, before anything is compiled or captured, a function for each router to call."""
        super().load_model(*args, **kwargs)
        rules: Any = self._coe_standing
        self.seen = {}
        for one in routed_layers(self.model_runner.get_model()):
            shape = (_TOKENS, rules.places)
            seen = torch.full(shape, -1, dtype=torch.int32, device=rules.table.device)
            self.seen[one.layer] = seen
            one.router.set_capture_fn(partial(_write, seen))


class SeeingExtension(PinnedExtension):
    """What a test asks of it."""

    def coe_seen(self, tokens: int) -> dict[int, list[list[int]]]:
        """What was chosen for the first so many tokens of the last step."""
        seen: dict[int, torch.Tensor] = self.seen  # type: ignore[attr-defined]
        return {layer: ids[:tokens].tolist() for layer, ids in seen.items()}

    def coe_compiled(self) -> int:
        """How many graphs were compiled so far."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
