"""A CUDA runtime without a GPU. It knows what is registered, and fails on demand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.engine.vllm.worker.cuda_runtime import CudaRuntime

PAGE_BYTES = 4096


class FakeCopy:
    """A copy behind kernels: its values are those of its end."""

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self.ended = False
        self.waited = 0

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self._target.copy_(self._source)

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.waited += not self.ended
        self.end()


class FakeCuda(CudaRuntime):
    """In place of CUDA.

    Attributes:
        registered: The sizes of registered ranges by address.
        devices: The device of the calling thread at each registration and at each set of copies.
        fails_at: The number of the registration that is refused, counted from 0.
        maps: Whether the addresses are those of real memory.
        copies_fail: How many sets of copies fail at their end.
        in_copies: Whether copies are being made.
        behind: The copies behind kernels that were started.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.devices: list[Any] = []
        self.calls = 0
        self.fails_at: int | None = None
        self.unregister_fails = False
        self.maps = False
        self.copies_fail = 0
        self.in_copies = 0
        self.behind: list[FakeCopy] = []
        self.given_bytes = self.peak_bytes = 0
        self._thread = threading.local()

    @property
    def device(self) -> Any:
        """The calling thread's device, as CUDA has it: 0 unless it was set."""
        return getattr(self._thread, "device", 0)

    def use_device(self, device: Any) -> None:
        self._thread.device = device

    def register(self, address: int, size_bytes: int) -> None:
        call, self.calls = self.calls, self.calls + 1
        self.devices.append(self.device)
        if call == self.fails_at:
            raise RuntimeError("shared memory could not be pinned: CUDA error 2")
        for begin, size in self.registered.items():
            first, last = address // PAGE_BYTES, (address + size_bytes - 1) // PAGE_BYTES
            if first <= (begin + size - 1) // PAGE_BYTES and begin // PAGE_BYTES <= last:
                raise RuntimeError("shared memory could not be pinned: CUDA error 712")
        self.registered[address] = size_bytes

    def unregister(self, address: int) -> None:
        assert not self.maps or _is_mapped(address), "the memory is gone, and CUDA holds its pages"
        if self.unregister_fails:
            raise RuntimeError("shared memory could not be given back: CUDA error 1")
        if address not in self.registered:
            raise RuntimeError("shared memory could not be given back: CUDA error 713")
        del self.registered[address]

    @contextmanager
    def copies(self) -> Iterator[None]:
        self.devices.append(self.device)
        self.in_copies += 1
        try:
            yield
        finally:
            self.in_copies -= 1
            if self.copies_fail:
                self.copies_fail -= 1
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def watch_memory(self, device: Any) -> int:
        self.peak_bytes = self.given_bytes
        return self.given_bytes

    def most_memory(self, device: Any) -> int:
        return self.peak_bytes

    def give(self, size_bytes: int) -> None:
        """Give out memory on the device, or take it back."""
        self.given_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.given_bytes)

    def copy_behind(self, source: Any, target: Any) -> Any:
        copy = FakeCopy(source, target)
        self.behind.append(copy)
        return copy

    def has(self, address: int, size_bytes: int) -> bool:
        """Whether one registration has all of a range, as copies need it."""
        return any(
            begin <= address and address + size_bytes <= begin + size
            for begin, size in self.registered.items()
        )


def install(monkeypatch: Any, runtime: FakeCuda) -> FakeCuda:
    """Make the worker's modules use it."""
    from service.engine.vllm.worker import gate_choice_recorder, pinned_swap_extension

    runtime.maps = True

    for module in (gate_choice_recorder, pinned_swap_extension):
        monkeypatch.setattr(module, "cuda_runtime", lambda: runtime)
    return runtime


def _is_mapped(address: int) -> bool:
    ranges = (
        line.split(maxsplit=1)[0] for line in Path("/proc/self/maps").read_text().splitlines()
    )
    return any(int(a, 16) <= address < int(b, 16) for a, b in (r.split("-") for r in ranges))
