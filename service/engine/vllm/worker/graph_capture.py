"""Seeing what routers choose where graphs are captured: they write it down themselves.

A captured graph calls none of our functions again, but goes on with the kernels that it was
captured with. So before anything is captured each router is given a function that copies its
choice to a place of its own on the device; after a step that is looked at, it is read from
there. vLLM's own `enable_return_routed_experts` writes it down in the same way, and then sends
every token's along with its request's answer; here only the steps that are sampled are read.

Written against vLLM's CUDA build; where there is no GPU, it has run on CPU only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from service.engine.steering_spec import NOTES
from service.engine.vllm.worker.gates import routed_layers


class ChoiceBuffer:
    """`chosen`: (tokens, layers, places), int32: each router's choice for the last step's tokens.

    -1 in places that a router never fills. `tokens`: of the largest step; `places`: the most
    experts that are chosen for a token.
    """

    def __init__(self, model: Any, tokens: int, places: int) -> None:
        """Have all routers write there. Raises ValueError where a kernel routes by itself."""
        self.layers = routed_layers(model)
        width = max([places, *(one.top_k for one in self.layers)])
        shape = (tokens, len(self.layers), width)
        device = next(model.parameters()).device
        # Tensors of inference can't be written to outside of it.
        with torch.inference_mode(False):
            self.chosen = torch.full(shape, -1, dtype=torch.int32, device=device)
        for place, one in enumerate(self.layers):
            one.router.set_capture_fn(partial(_note, self.chosen[:, place]))


def _note(there: torch.Tensor, ids: torch.Tensor) -> None:
    there[: ids.shape[0], : ids.shape[1]].copy_(ids)


class ChoiceRecorderMixin:
    """A vLLM worker whose routers write down what they choose, if its engine asks for it.

    `_coe_noted`: where, or why they can't. The worker's extension is told after each step.
    """

    # Set by vLLM's worker.
    vllm_config: Any
    model_runner: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load it as vLLM does; then, before anything is captured, have choices written down."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # the worker's
        if not self.vllm_config.additional_config.get(NOTES):
            return
        tokens = int(self.vllm_config.scheduler_config.max_num_batched_tokens)
        places = int(getattr(getattr(self, "_coe_standing", None), "places", 0))
        try:
            self._coe_noted: ChoiceBuffer | str = ChoiceBuffer(
                self.model_runner.get_model(), tokens, places
            )
        except ValueError as error:
            self._coe_noted = str(error)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """A step, as vLLM does it; then a look at what was written down."""
        done = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]  # the worker's
        if scheduler_output.total_num_scheduled_tokens:
            self._coe_stepped()  # type: ignore[attr-defined]  # the extension's
        return done
