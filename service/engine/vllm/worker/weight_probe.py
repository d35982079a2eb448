"""The probe, which checks that a model's weights have not changed since they were loaded.

A few linear layers, in rotation, compute their output for a fixed vector. The output must equal the
recorded output bit for bit. A checksum of the parameters would prove nothing on CPU, because
packing empties them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from service.engine.vllm.worker.model_access import (
    PLAIN_METHODS,
    linear_input_size,
    linear_layers,
    linear_output,
    packed_weight,
    weight_method,
)
from service.engine.vllm.worker.model_state import ends_of

_ROWS = 2
_LAYERS = 3
_VALUES = 16


@dataclass(slots=True)
class WeightProbe:
    """The record of one model when it was loaded.

    Attributes:
        layers: The linear layers, each with its packed weight and its output.
        values: The parameters and other tensors, each with its first values.
        checked: The number of layers that were checked so far.
        dtype: The dtype of the model's activations.
    """

    layers: list[tuple[torch.nn.Module, object | None, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    checked: int = 0
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls, model: torch.nn.Module, dtype: torch.dtype, others: Iterable[torch.Tensor] = ()
    ) -> WeightProbe:
        """Record a model. This must not run in a thread beside the running model.

        oneDNN's kernels in vLLM share one scratch pad, so two threads would corrupt each other's
        results.

        Args:
            model: The model.
            dtype: The dtype of the model's activations. Quantised weights have another one.
            others: Tensors besides parameters, such as those that kernels hold.
        """
        probe = cls(dtype=dtype)
        with torch.inference_mode():
            linears = linear_layers(model)
            for module in linears[:: max(1, len(linears) // 12)]:
                probe.layers.append((module, packed_weight(module), _output(module, dtype)))
            for parameter in (*model.parameters(), *others):
                probe.values.append((parameter, _first_values(parameter)))
        return probe

    def verify(self, *, whole: bool = False) -> bool:
        """Return whether the model equals the record.

        The packed weights must be the recorded objects, every parameter must begin with the
        recorded values, and a few layers must compute the recorded output.

        Args:
            whole: Whether to compute all recorded layers instead of the next few.
        """
        with torch.inference_mode():
            # As bytes: a layout may have values that equal nothing.
            if any(
                not torch.equal(_first_values(parameter), expected)
                for parameter, expected in self.values
            ):
                return False
            if any(packed_weight(module) is not packed for module, packed, _ in self.layers):
                return False
            count = len(self.layers) if whole else min(_LAYERS, len(self.layers))
            for i in range(count):
                module, _, expected = self.layers[(self.checked + i) % len(self.layers)]
                if not torch.equal(_output(module, self.dtype), expected):
                    return False
            self.checked += _LAYERS
        return True


def _first_values(parameter: torch.Tensor) -> torch.Tensor:
    return ends_of(parameter, _VALUES)[0]


def _output(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """A linear layer's output for a fixed vector."""
    size = linear_input_size(module)
    generator = torch.Generator().manual_seed(size)
    parameter = next(module.parameters(), None)
    device = parameter.device if parameter is not None else torch.get_default_device()
    if parameter is not None and weight_method(module) in PLAIN_METHODS:
        dtype = parameter.dtype  # a gate may compute in float32 in a model of bfloat16
    vector = torch.randn(_ROWS, size, generator=generator).to(device=device, dtype=dtype)
    return linear_output(module, vector).clone()
