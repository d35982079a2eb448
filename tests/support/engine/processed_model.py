"""A small model whose weights a GPU's kernels want changed: quantised layers, and a mixture."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.engine.dense_model import Attention


class Kernel:
    """A kernel with scales of its own, which are no parameters of a layer."""

    def __init__(self, scale: torch.Tensor, block: int) -> None:
        self.scale = scale
        self.block = block


class Fp8LinearMethod:
    """Named as vLLM's, by which it is known."""

    def __init__(self, scale: torch.Tensor, block: int) -> None:
        self.kernel = Kernel(scale, block)

    def apply(self, layer: Any, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ layer.weight.float()) * layer.weight_scale * self.kernel.scale


class UnquantizedFusedMoEMethod:
    """Named as vLLM's, with a table that its kernel made."""

    def __init__(self, order: torch.Tensor) -> None:
        self.kernel = Kernel(order, 16)


for _kind in (Kernel, Fp8LinearMethod, UnquantizedFusedMoEMethod):
    _kind.__module__ = "vllm.model_executor.fake"


def _quantised(width: int, block: int) -> Any:
    made = torch.nn.Module()
    made.input_size = width
    weight = torch.randint(-9, 9, (width, width), dtype=torch.int8).t()  # as kernels want it
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.weight_scale = torch.nn.Parameter(torch.rand(width) + 0.5, requires_grad=False)
    made.quant_method = Fp8LinearMethod(torch.rand(width) + 0.5, block)
    return made


def _mixture(width: int, experts: int = 4) -> Any:
    made = torch.nn.Module()
    for name, shape in (("w13_weight", (2 * width, width)), ("w2_weight", (width, width))):
        weight = torch.randn(experts, *shape)
        setattr(made, name, torch.nn.Parameter(weight, requires_grad=False))
    made.quant_method = UnquantizedFusedMoEMethod(torch.rand(experts))
    return made


def processed_model(seed: int, width: int = 8, block: int = 128) -> Any:
    """Random weights of one family. `block` is a number that its kernels were built with."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(_quantised(width, block), _mixture(width), _quantised(width, block))
    made.append(Attention())
    return made
