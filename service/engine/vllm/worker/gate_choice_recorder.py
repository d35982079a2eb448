"""Recording of the choices of gates under captured graphs, through a buffer on the device.

A captured graph only replays its kernels and calls no Python function again. Each router therefore
gets a function before the capture that copies its choice into a buffer on the device. The worker
reads the buffer after a sampled step. vLLM's own `enable_return_routed_experts` records choices in
the same way, but sends the choices of every token along with the answer.

The code is written for vLLM's CUDA build. Without a GPU it was run only on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.engine.steering_data import RECORD_CHOICES_KEY
from service.engine.vllm.worker.cuda_runtime import Copied, cuda_runtime
from service.engine.vllm.worker.gate_access import routed_layers
from service.engine.vllm.worker.model_access import scheduled_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@dataclass(frozen=True, slots=True)
class ChoiceCopy:
    """Choices of one step on their way from the device.

    Attributes:
        chosen: The choices, int32 (tokens, layers, places), once they have arrived.
        copied: The copy; None where there is no GPU.
    """

    chosen: NDArray[np.int32]
    copied: Copied | None

    @property
    def arrived(self) -> bool:
        """Whether the copy has ended."""
        return self.copied is None or self.copied.query()

    def wait(self) -> NDArray[np.int32]:
        """Wait for the choices and return them. The next copy overwrites them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.chosen


class ChoiceBuffer:
    """The choices of all routers for the tokens of the last step.

    Attributes:
        layers: The layers with gates, in order.
        chosen: The chosen experts, int32 (tokens, layers, places). Places that a router never
            fills have the value -1.
    """

    def __init__(self, model: torch.nn.Module, tokens: int, places: int) -> None:
        """Make all routers of a model write to the buffer.

        Args:
            model: The running model.
            tokens: The number of tokens of the largest step.
            places: The largest number of routed experts that are chosen for a token.

        Raises:
            ValueError: A kernel does the routing itself.
        """
        self.layers = routed_layers(model)
        width = max([places, *(routed.top_k for routed in self.layers)])
        shape = (tokens, len(self.layers), width)
        device = next(model.parameters()).device
        # Tensors made in inference mode can be written only in inference mode.
        with torch.inference_mode(False):
            self.chosen = torch.full(shape, -1, dtype=torch.int32, device=device)
            # A copy to memory that is not pinned would wait for the device.
            self._host = torch.empty(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        for index, routed in enumerate(self.layers):
            routed.watch_choices(partial(_copy_choice, self.chosen[:, index]))

    def start_copy(self, tokens: int) -> ChoiceCopy:
        """Copy the choices of the last step to the host, without waiting for the step.

        Args:
            tokens: The number of tokens of the step.
        """
        source, target = self.chosen[:tokens], self._host[:tokens]
        if (runtime := cuda_runtime()) is None:
            target.copy_(source)
            return ChoiceCopy(target.numpy(), None)
        return ChoiceCopy(target.numpy(), runtime.copy_behind(source, target))


def _copy_choice(place: torch.Tensor, ids: torch.Tensor) -> None:
    place[: ids.shape[0], : ids.shape[1]].copy_(ids)


class ChoiceRecorderMixin:
    """A mixin for vLLM workers whose routers record their choices, if the engine asks for it.

    `_coe_choices` is the buffer or the reason why there is no buffer. The mixin calls the worker's
    extension after each step.
    """

    # Set by vLLM's worker.
    vllm_config: VllmConfig
    model_runner: GPUModelRunner

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does, and set up the buffer before graphs are captured."""
        super().load_model(*args, **kwargs)  # type: ignore[misc]  # the worker's
        if not self.vllm_config.additional_config.get(RECORD_CHOICES_KEY):
            return
        tokens = int(self.vllm_config.scheduler_config.max_num_batched_tokens)
        places = int(getattr(getattr(self, "_coe_graph_steering", None), "places", 0))
        try:
            self._coe_choices: ChoiceBuffer | str = ChoiceBuffer(
                self.model_runner.get_model(), tokens, places
            )
        except ValueError as error:
            self._coe_choices = str(error)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a step as vLLM does, and sample the choices."""
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]  # the worker's
        if scheduled_tokens(scheduler_output):
            self._coe_stepped()  # type: ignore[attr-defined]  # the extension's
        return output
