"""The CPU worker without packed weights, so that a GPU's way of swaps runs in a real engine."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import utils
from vllm.v1.worker.cpu_worker import CPUWorker


class PlainCpuWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not read for types
    """Every product is torch's own, with the parameter as it was loaded."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model as vLLM does, but for the packing."""

        def plain(layer: Any, remove_weight: bool) -> None:
            del remove_weight
            layer.cpu_linear = torch.nn.functional.linear

        utils.dispatch_cpu_unquantized_gemm = plain
        super().load_model(*args, **kwargs)
