"""The memory of a pool's GPUs: what its engines reserve, and what the driver counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from service.engine.gpu_share import GpuShare
from service.gpu_devices import GpuMemory

log = logging.getLogger("coe.pool")

# A call of nvidia-smi takes a tenth of a second or more.
FRESH_S = 5.0
# Prometheus and the console give a pool a few seconds for all it tells.
PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU of a pool's replica.

    Attributes:
        memory: What the driver counts, for all processes together.
        reserved_bytes: The shares of this pool's engines, and the room in which they make layers of
            other experts ready. vLLM lets an engine start only where its share is free.
    """

    memory: GpuMemory
    reserved_bytes: int

    def to_wire(self) -> dict[str, Any]:
        """Return the state as JSON."""
        return {**asdict(self.memory), "reserved_bytes": self.reserved_bytes}


class GpuMemoryMonitor:
    """Reads the GPUs' memory in a thread, at most once in five seconds.

    A driver that hangs keeps nobody waiting: after two seconds there are no states until a reading
    ends, since old figures would pass for new ones.

    Args:
        read: Returns the memory of the GPUs that this process sees, in CUDA's order. It may block.
        reserved: Returns the shares of engines, by position in that order.
        clock: Returns seconds.
        patience_s: The longest wait for a reading.
    """

    def __init__(
        self,
        read: Callable[[], tuple[GpuMemory, ...]],
        reserved: Callable[[], Mapping[int, Sequence[GpuShare]]],
        clock: Callable[[], float] = time.monotonic,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._read = read
        self._reserved = reserved
        self._clock = clock
        self._patience_s = patience_s
        self._read_s = float("-inf")
        self._memory: tuple[GpuMemory, ...] = ()
        self._reading: asyncio.Task[None] | None = None
        self._began_s = 0.0

    async def states(self) -> tuple[GpuState, ...]:
        """Return the state of each GPU; callers at one moment share one reading."""
        if self._reading is None and self._clock() - self._read_s >= FRESH_S:
            self._reading = asyncio.create_task(self._take_reading())
            self._began_s = self._clock()
        if (reading := self._reading) is not None:
            waited_s = self._clock() - self._began_s
            # `wait` cancels nothing: one who leaves does not end the reading of the others.
            await asyncio.wait((reading,), timeout=max(0.0, self._patience_s - waited_s))
            if not reading.done():
                return ()
        shares = self._reserved()
        return tuple(
            GpuState(
                memory, sum(share.reserved_bytes(memory.total_bytes) for share in shares.get(i, ()))
            )
            for i, memory in enumerate(self._memory)
        )

    async def _take_reading(self) -> None:
        try:
            self._memory = await asyncio.to_thread(self._read)
        except Exception as error:
            # Nobody may be waiting for it any more.
            log.warning("reading the memory of GPUs failed: %s", error)
            self._memory = ()
        finally:
            self._read_s = self._clock()
            self._reading = None
