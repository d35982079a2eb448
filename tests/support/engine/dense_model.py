"""A small model with the attributes of vLLM's layers, and a worker's extension around it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class UnquantizedLinearMethod:
    """Named as vLLM's is, by which it is known."""

    def apply(self, layer: Any, rows: torch.Tensor) -> torch.Tensor:
        return rows @ layer.weight.T


class Linear(torch.nn.Module):
    """A linear layer as vLLM has it."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.input_size = into
        self.quant_method = UnquantizedLinearMethod()
        self.weight = torch.nn.Parameter(torch.randn(out, into), requires_grad=False)


class Attention(torch.nn.Module):
    """A layer with a part of the KV cache, and a buffer that is never copied."""

    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = [torch.zeros(4)]
        self.register_buffer("scale", torch.ones(1))


def dense_model(seed: int, layers: int = 3, width: int = 8) -> Any:
    """Random weights of one family."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(*(Linear(width, width) for _ in range(layers)), Attention())
    made.register_buffer("table", torch.randn(3))
    return made


def extension(model: Any, folder: Path, rank: int = 0, ranks: int = 1, experts: str = "abc") -> Any:
    """A GPU worker's extension, without a worker around it."""
    from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension

    made = PinnedExtension()
    made.rank, made.device = rank, rank
    made.model_runner = SimpleNamespace(model=model)
    made.vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=ranks),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    for name in experts:
        made.coe_share(name, str(folder / f"key-{name}"), "token")
    return made


def loads(monkeypatch: Any, models: dict[str, Any]) -> None:
    """Let every extension load these models' tensors, instead of files, by expert."""
    from service.engine.vllm.worker import pinned_swap_extension

    def prepare(self: Any, expert: str, load: Any) -> Any:
        return lambda: self._coe_hold(expert, pinned_swap_extension.tensors_of(models[expert]))

    monkeypatch.setattr(pinned_swap_extension.SwapExtension, "_coe_prepare_load", prepare)


def loaded(one: Any, expert: str, folder: str = "nowhere") -> dict[str, Any]:
    """The result of a load."""
    one.coe_load_to_host(expert, folder, None, 1.0)
    until_s = time.monotonic() + 30
    while (result := one.coe_load_result(expert))["state"] == "loading":
        assert time.monotonic() < until_s
        time.sleep(0.001)  # a thread of the worker's own: there is no event to await
    return dict(result)
