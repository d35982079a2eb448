"""Packs each matrix as soon as it has been read (CPU).

vLLM's loader copies every weight into a new parameter and packs all weights at the end. It thus
writes each byte to fresh memory twice. Here vLLM's own packer packs a matrix as soon as it is
complete. A fused matrix is assembled in a scratch buffer, which the next layer of that shape
reuses. Tied embeddings are packed once. The result is the same as vLLM's result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from service.engine.vllm.worker.model_access import share_packed_weight

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase


class ScratchBuffers:
    """Buffers to assemble matrices in, by shape and dtype.

    Attributes:
        packed_bytes: Bytes of packed weights, which are in no tensor of the model.
    """

    def __init__(self) -> None:
        self.packed_bytes = 0
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def acquire(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return an unused buffer with arbitrary values."""
        free = self._free[shape, dtype]
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def release(self, tensor: torch.Tensor) -> None:
        """Give back a buffer that is not used any more."""
        self._free[tensor.shape, tensor.dtype].append(tensor)


class _Matrix:
    """One linear layer's weight while it is read. `loader` is vLLM's own, which places parts."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        loader: Callable[..., None],
        scratch: ScratchBuffers,
    ) -> None:
        self._name = name
        self._module = module
        self._parameter = module.weight
        self._loader = loader
        self._scratch = scratch
        self._left = module.weight.numel()
        self._bytes = self._left * module.weight.element_size()
        self._own: torch.Tensor | None = None

    def __call__(
        self, parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """Store a part of the matrix. vLLM calls this with each part that it reads."""
        shape, dtype = parameter.shape, parameter.dtype
        if (
            not args
            and not kwargs
            and self._own is None
            and (loaded.shape, loaded.dtype) == (shape, dtype)
            and loaded.is_contiguous()
        ):
            # This is the whole matrix, so it is packed directly from the mapped file.
            parameter.data = loaded
            self._pack(mapped=True)
            return
        if self._own is None:
            parameter.data = self._own = self._scratch.acquire(shape, dtype)
        self._loader(parameter, loaded, *args, **kwargs)
        self._left -= loaded.numel()
        if self._left == 0:
            self._pack(mapped=False)

    def check(self) -> None:
        """Check that no part is missing. vLLM would continue with arbitrary values.

        Raises:
            ValueError: A part is missing.
        """
        if self._own is not None:
            raise ValueError(f"{self._name}: {self._left} of its values are not in the file")

    def _pack(self, *, mapped: bool) -> None:
        module = self._module
        module.quant_method.process_weights_after_loading(module)
        if module.weight is self._parameter:
            # The layer keeps the parameter, so it must be neither a scratch buffer nor a file.
            if mapped:
                module.weight.data = module.weight.data.clone()
        else:
            # A reference cycle would keep the file mapped until the garbage collector runs.
            self._parameter.data = torch.empty(0, dtype=self._parameter.dtype)
            self._scratch.packed_bytes += self._bytes
            if self._own is not None:
                self._scratch.release(self._own)
        self._own = None


@contextmanager
def packing_as_read(model: torch.nn.Module, scratch: ScratchBuffers) -> Iterator[None]:
    """Pack each matrix as soon as it is complete while a model is read, where this is safe.

    This is safe for vLLM's plain linear layers that are not split over processes and have their
    own weight as their only parameter. All other layers are loaded as usual.

    Raises:
        ValueError: A matrix is still incomplete at the end.
    """
    matrices = list(_matrices(model, scratch))
    yield
    for matrix in matrices:
        matrix.check()


def _matrices(model: torch.nn.Module, scratch: ScratchBuffers) -> Iterator[_Matrix]:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    users: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] += 1
    for name, module in model.named_modules():
        if type(getattr(module, "quant_method", None)) is not UnquantizedLinearMethod:
            continue
        own = dict(module.named_parameters(recurse=False))
        weight = own.get("weight")
        if (
            len(own) == 1
            and weight is not None
            and weight.dim() == 2
            and users[id(weight)] == 1
            and getattr(module, "tp_size", 1) == 1
        ):
            matrix = _Matrix(name, module, weight.weight_loader, scratch)
            weight.weight_loader = matrix
            yield matrix


@contextmanager
def packing_tied_once(model: torch.nn.Module, scratch: ScratchBuffers) -> Iterator[None]:
    """Let tied embeddings share one packed weight while vLLM packs the other layers."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    first_of: dict[int, torch.nn.Module] = {}
    patched: list[QuantizeMethodBase] = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or type(method) is not UnquantizedEmbeddingMethod:
            continue
        first = first_of.setdefault(id(module.weight), module)
        if first is module:
            scratch.packed_bytes += module.weight.numel() * module.weight.element_size()
        if first is not module and method is not first.quant_method:

            def share(layer: torch.nn.Module, first: torch.nn.Module = first) -> None:
                share_packed_weight(first, layer)

            method.process_weights_after_loading = share
            patched.append(method)
    try:
        yield
    finally:
        for method in patched:
            del method.process_weights_after_loading
