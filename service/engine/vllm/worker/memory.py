"""What weights take: a model's tensors, and a process's resident memory."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

from service.host_memory import free_bytes

_PAGE_BYTES = 4096
# glibc's <malloc.h>; the arenas of its threads are made of heaps of 64 MiB.
_M_TRIM_THRESHOLD, _M_TOP_PAD = -1, -2
_KEPT_BYTES = 2**31 - 1
_HEAP_BYTES = 64 * 1024**2


def tensor_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, those that it shares with itself once."""
    seen: set[int] = set()
    total = 0
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def resident_bytes() -> int:
    """This process's resident bytes."""
    return _statm()[1]


def own_bytes() -> int:
    """Resident bytes that are this process's own: files that it has mapped don't count."""
    _, resident, shared = _statm()[:3]
    return resident - shared


def check_room(model: Any) -> None:
    """Raises MemoryError where a model that is built and not yet loaded would not fit.

    Without it the system would end this process, and every request in it.
    """
    needed = tensor_bytes(model)
    if needed > free_bytes():
        give_back()
        if needed > (free := free_bytes()):
            raise MemoryError(f"it takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} are free")


def keep_freed() -> None:
    """Freed memory is kept for what is allocated next, until `give_back`."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, _HEAP_BYTES)


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _statm() -> list[int]:
    with open("/proc/self/statm") as file:
        return [int(pages) * _PAGE_BYTES for pages in file.read().split()]
