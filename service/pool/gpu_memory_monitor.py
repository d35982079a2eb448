"""The memory of a pool's GPUs: what its engines reserve, and what the driver counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from service.gpu_devices import GpuMemory

# A call of nvidia-smi takes a tenth of a second or more.
FRESH_S = 5.0


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU of a pool's replica.

    Attributes:
        memory: What the driver counts, for all processes together.
        reserved_bytes: The shares of this pool's engines. vLLM lets an engine start only where its
            share is free.
    """

    memory: GpuMemory
    reserved_bytes: int

    def to_wire(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {**asdict(self.memory), "reserved_bytes": self.reserved_bytes}


class GpuMemoryMonitor:
    """Reads the GPUs' memory in a thread, at most once in five seconds.

    Args:
        read: Returns the memory of the GPUs that this process sees, in CUDA's order. It may block.
        reserved: Returns the sum of engines' shares, by position in that order.
        clock: Returns seconds.
    """

    def __init__(
        self,
        read: Callable[[], tuple[GpuMemory, ...]],
        reserved: Callable[[], Mapping[int, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._reserved = reserved
        self._clock = clock
        self._read_s = float("-inf")
        self._memory: tuple[GpuMemory, ...] = ()
        self._turn = asyncio.Lock()

    async def states(self) -> tuple[GpuState, ...]:
        """Return the state of each GPU; callers at one moment share one reading."""
        async with self._turn:
            if self._clock() - self._read_s >= FRESH_S:
                self._memory = await asyncio.to_thread(self._read)
                self._read_s = self._clock()
        shares = self._reserved()
        return tuple(
            GpuState(memory, round(shares.get(i, 0.0) * memory.total_bytes))
            for i, memory in enumerate(self._memory)
        )
