"""The probe: whether a model's weights are still those that were loaded.

A few linear layers, in rotation, are asked for their output on a fixed vector, which must be
bit for bit what it was. A sum over the parameters would prove nothing on CPU: packing
empties them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_ROWS = 2
_LAYERS = 3
_VALUES = 16


@dataclass(slots=True)
class Probe:
    """What was recorded of one model when it was loaded."""

    layers: list[tuple[Any, Any, torch.Tensor]] = field(default_factory=list)
    values: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    asked: int = 0

    @classmethod
    def of(cls, model: Any) -> Probe:
        """Record a model. Not in a thread beside the running one.

        oneDNN's kernels in vLLM share one scratch pad, and two threads in it spoil
        each other's products.
        """
        probe = cls()
        with torch.inference_mode():
            linears = [
                module
                for module in model.modules()
                if hasattr(module, "quant_method") and hasattr(module, "input_size")
            ]
            for module in linears[:: max(1, len(linears) // 12)]:
                probe.layers.append((module, _packed(module), _ask(module)))
            for parameter in model.parameters():
                probe.values.append((parameter, _begin(parameter)))
        return probe

    def holds(self) -> bool:
        """Whether the model is as recorded.

        All packed layers must be the very objects that were recorded, every parameter
        that is not packed must begin as it did, and a few layers answer as they did.
        """
        with torch.inference_mode():
            if any(not torch.equal(_begin(one), expected) for one, expected in self.values):
                return False
            if any(_packed(module) is not packed for module, packed, _ in self.layers):
                return False
            for i in range(min(_LAYERS, len(self.layers))):
                module, _, expected = self.layers[(self.asked + i) % len(self.layers)]
                if not torch.equal(_ask(module), expected):
                    return False
            self.asked += _LAYERS
        return True


def _packed(module: Any) -> Any:
    return getattr(module, "cpu_linear", None)


def _begin(parameter: Any) -> torch.Tensor:
    begin: torch.Tensor = parameter.detach().flatten()[:_VALUES].clone()
    return begin


def _ask(module: Any) -> torch.Tensor:
    """A layer's output for a fixed vector."""
    size = getattr(module, "input_size_per_partition", module.input_size)
    generator = torch.Generator().manual_seed(size)
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    dtype = parameters[0].dtype if parameters else torch.get_default_dtype()
    device = parameters[0].device if parameters else torch.get_default_device()
    vector = torch.randn(_ROWS, size, generator=generator).to(device=device, dtype=dtype)
    answer: torch.Tensor = module.quant_method.apply(module, vector)
    return answer.clone()
