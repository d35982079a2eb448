"""Packing each matrix as soon as it has been read (CPU).

vLLM's loader copies every weight into a new parameter, and packs them all at the end:
each byte is written to memory that was never touched before, twice. Here a matrix that
is complete is packed at once, by vLLM's own packer, and where it had to be put together
from parts (fused layers), in a scratch that the next layer of that shape uses again.
Tied embeddings are packed once. What comes out is what vLLM would have made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ScratchBuffers:
    """Matrices to put parts together in, by shape and dtype.

    `packed_bytes`: what was packed meanwhile, of which no tensor tells.
    """

    def __init__(self) -> None:
        self.packed_bytes = 0
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = defaultdict(list)

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """One that nobody uses; what is in it is left over."""
        free = self._free[shape, dtype]
        return free.pop() if free else torch.empty(shape, dtype=dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """It is not used any more."""
        self._free[tensor.shape, tensor.dtype].append(tensor)


class _Matrix:
    """One linear layer's weight on its way in. `loader`: vLLM's own, which knows where parts go."""

    def __init__(
        self, name: str, module: Any, loader: Callable[..., None], scratch: ScratchBuffers
    ) -> None:
        self._name = name
        self._module = module
        self._parameter = module.weight
        self._loader = loader
        self._scratch = scratch
        self._left = module.weight.numel()
        self._bytes = self._left * module.weight.element_size()
        self._own: torch.Tensor | None = None

    def __call__(self, parameter: Any, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """What vLLM calls with each part that it reads."""
        shape, dtype = parameter.shape, parameter.dtype
        if (
            not args
            and not kwargs
            and self._own is None
            and (loaded.shape, loaded.dtype) == (shape, dtype)
            and loaded.is_contiguous()
        ):
            # The whole of it: packed from where it was read.
            parameter.data = loaded
            self._pack(mapped=True)
            return
        if self._own is None:
            parameter.data = self._own = self._scratch.take(shape, dtype)
        self._loader(parameter, loaded, *args, **kwargs)
        self._left -= loaded.numel()
        if self._left == 0:
            self._pack(mapped=False)

    def check(self) -> None:
        """Raises ValueError where parts are missing: vLLM would go on with what memory held."""
        if self._own is not None:
            raise ValueError(f"{self._name}: {self._left} of its values are not in the file")

    def _pack(self, *, mapped: bool) -> None:
        module = self._module
        module.quant_method.process_weights_after_loading(module)
        if module.weight is self._parameter:
            # A kind of layer that goes on using it: it must not be another's scratch, nor a file.
            if mapped:
                module.weight.data = module.weight.data.clone()
        else:
            # These two hold each other; the file must not stay mapped until the collector comes.
            self._parameter.data = torch.empty(0, dtype=self._parameter.dtype)
            self._scratch.packed_bytes += self._bytes
            if self._own is not None:
                self._scratch.give(self._own)
        self._own = None


@contextmanager
def packing_as_read(model: Any, scratch: ScratchBuffers) -> Iterator[None]:
    """While a model is read, what is complete is packed at once, where that is safe.

    Raises ValueError at the end where a matrix was not read whole.

    Safe: vLLM's plain linear layers, not split over processes, whose only parameter is
    the weight and theirs alone. All others go vLLM's usual way.
    """
    matrices = list(_matrices(model, scratch))
    yield
    for matrix in matrices:
        matrix.check()


def _matrices(model: Any, scratch: ScratchBuffers) -> Iterator[_Matrix]:
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
def packing_tied_once(model: Any, scratch: ScratchBuffers) -> Iterator[None]:
    """While vLLM packs what is left: embeddings that share a weight share its packed form."""
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    first_of: dict[int, Any] = {}
    patched = []
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if type(method) is not UnquantizedEmbeddingMethod:
            continue
        first = first_of.setdefault(id(module.weight), module)
        if first is module:
            scratch.packed_bytes += module.weight.numel() * module.weight.element_size()
        if first is not module and method is not first.quant_method:

            def share(layer: Any, first: Any = first) -> None:
                if hasattr(first, "cpu_linear"):
                    layer.cpu_linear = first.cpu_linear

            method.process_weights_after_loading = share
            patched.append(method)
    try:
        yield
    finally:
        for method in patched:
            del method.process_weights_after_loading
