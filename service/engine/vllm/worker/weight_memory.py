"""Memory of weights: bytes of a model's tensors, and resident bytes of this process."""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

from service.host_memory import free_bytes

if TYPE_CHECKING:
    import torch

_PAGE_BYTES = 4096
# The constants are from glibc's <malloc.h>. Its thread arenas consist of heaps of 64 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD = -1, -2
_KEPT_BYTES = 2**31 - 1
_HEAP_BYTES = 64 * 1024**2


def tensor_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers. Shared tensors count once."""
    seen: set[int] = set()
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def resident_bytes() -> int:
    """Return this process's resident bytes."""
    return _statm()[1]


def own_bytes() -> int:
    """Return this process's resident bytes without mapped files."""
    _, resident, shared = _statm()[:3]
    return resident - shared


def check_room(model: torch.nn.Module) -> None:
    """Check that the weights of a new model will fit into memory.

    Without this check the system would kill the process with all its requests.

    Raises:
        MemoryError: The weights do not fit.
    """
    needed = tensor_bytes(model)
    if needed > free_bytes():
        release_freed()
        if needed > (free := free_bytes()):
            raise MemoryError(f"it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} are free")


def keep_freed() -> None:
    """Keep freed memory for later allocations until `release_freed` is called."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, _HEAP_BYTES)


def release_freed() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _statm() -> list[int]:
    with open("/proc/self/statm") as file:
        return [int(pages) * _PAGE_BYTES for pages in file.read().split()]
