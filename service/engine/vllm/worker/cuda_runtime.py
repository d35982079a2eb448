"""The calls of the CUDA runtime that loads and swaps make, in one place.

A thread starts with device 0 as its device. A call from a thread of another device's worker would
make a second context on device 0, which takes some hundred megabytes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch


class Copied(Protocol):
    """A copy that was started, as a CUDA event."""

    def query(self) -> bool:
        """Return whether the copy has ended."""

    def synchronize(self) -> None:
        """Wait for the end of the copy."""


class CudaRuntime:
    """CUDA as torch gives it."""

    def use_device(self, device: torch.device) -> None:
        """Make a device the calling thread's."""
        torch.cuda.set_device(device)

    def register(self, address: int, size_bytes: int) -> None:
        """Pin host memory for copies.

        Raises:
            RuntimeError: CUDA refuses.
        """
        _check(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0), "be pinned")

    def unregister(self, address: int) -> None:
        """Undo `register`.

        Raises:
            RuntimeError: CUDA refuses.
        """
        _check(torch.cuda.cudart().cudaHostUnregister(address), "be given back")

    def watch_memory(self, device: torch.device) -> int:
        """Begin to watch a device's memory, and return the bytes that torch has given out there."""
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))

    def most_memory(self, device: torch.device) -> int:
        """Return the most bytes that torch had given out at once since `watch_memory`."""
        return int(torch.cuda.max_memory_allocated(device))

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Make copies within the context on a stream of their own, and wait for them at its end."""
        stream = torch.cuda.Stream()
        # No kernel that still reads the old weights may overlap with the copies.
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            # After a failed copy, too: the earlier copies must not run into later ones.
            stream.synchronize()

    def copy_behind(self, source: torch.Tensor, target: torch.Tensor) -> Copied:
        """Copy to pinned memory, behind the kernels that were launched so far."""
        target.copy_(source, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        done: Copied = copied
        return done


_CUDA = CudaRuntime()


def cuda_runtime() -> CudaRuntime | None:
    """Return the CUDA runtime, or None where there is no GPU."""
    return _CUDA if torch.cuda.is_available() else None


def _check(code: int, what: str) -> None:
    if int(code) != 0:
        raise RuntimeError(f"shared memory could not {what}: CUDA error {int(code)}")
