"""A GPU worker's extension with a CUDA runtime and copies that fail on demand, in a real engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from service.engine.vllm.worker import pinned_swap_extension
from service.engine.vllm.worker.pinned_swap_extension import PinnedExtension
from tests.support.engine import fake_cuda


class FailingPinnedExtension(PinnedExtension):
    """What a test does to it."""

    _cuda: fake_cuda.FakeCuda

    def coe_pretend_cuda(self) -> None:
        """Make swaps copy from registered memory, in pieces of pages."""
        self._cuda = fake_cuda.install(SimpleNamespace(setattr=setattr), fake_cuda.FakeCuda())

    def coe_fail_copies(self, after: int, count: int) -> None:
        """Let `count` copies fail half way, after `after` more that do not."""
        copy = _copy
        left = iter([True] * after + [False] * count)

        def fails(source: Any, offset: int, target: Any) -> None:
            assert self._cuda.has(source.data_ptr(), source.numel() * source.element_size())
            if next(left, True):
                copy(source, offset, target)
                return
            half = source.shape[0] // 2
            target[:half].copy_(source[:half])
            raise RuntimeError("CUDA error: unspecified launch failure")

        pinned_swap_extension._copy_pinned = fails

    def coe_tensors(self) -> int:
        """The number of an expert's tensors."""
        return len(pinned_swap_extension.tensors_of(self.model_runner.model))

    def coe_compiled(self) -> int:
        """The number of graphs that were compiled so far."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


_copy = pinned_swap_extension._copy_pinned
