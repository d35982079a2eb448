"""Registration of host memory with CUDA, piece by piece.

The driver pins pages under a lock that launches of kernels need, too. One call for gigabytes would
stop the running expert for a second. So memory is registered in pieces, with pauses between them.
A copy must not span two pieces, because CUDA takes a range of host memory only if one registration
has all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.engine.vllm.worker.cuda_runtime import CudaRuntime

log = logging.getLogger("coe.engine")

# A multiple of the page size. At 14 GB/s, pinning it takes 5 ms.
PIECE_BYTES = 64 * 1024**2


@dataclass(slots=True)
class Registration:
    """Host memory that is registered with CUDA.

    Attributes:
        addresses: The addresses of the pieces.
        longest_s: The longest duration of one call, which is how long kernels may have waited.
        runtime: The runtime that has the registration.
    """

    addresses: list[int]
    longest_s: float
    runtime: CudaRuntime

    def release(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Unregister all pieces, with pauses. A second call does nothing."""
        addresses, self.addresses = self.addresses, []
        for address in addresses:
            began_s = clock()
            try:
                self.runtime.unregister(address)
            except RuntimeError as error:
                # The pages stay pinned until the process ends. Nothing else depends on them.
                log.warning("host memory stays pinned: %s", error)
            sleep(clock() - began_s)


def register(
    runtime: CudaRuntime,
    address: int,
    size_bytes: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Registration:
    """Register memory. This belongs into a thread beside the running model.

    Args:
        runtime: The CUDA runtime.
        address: The address of the memory, at the beginning of a page.
        size_bytes: The size of the memory in bytes.
        clock: A function that returns the time in seconds.
        sleep: A function that waits for some seconds.

    Raises:
        RuntimeError: CUDA refuses a piece. The earlier pieces are unregistered again.
    """
    done = Registration([], 0.0, runtime)
    try:
        for begin in range(0, size_bytes, PIECE_BYTES):
            began_s = clock()
            runtime.register(address + begin, min(PIECE_BYTES, size_bytes - begin))
            done.addresses.append(address + begin)
            took_s = clock() - began_s
            done.longest_s = max(done.longest_s, took_s)
            # The running model gets as much time as the driver took.
            sleep(took_s)
    except BaseException:
        done.release(clock=clock, sleep=sleep)
        raise
    return done


def parts_of(offset: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Split a range of registered memory where one piece ends and the next begins.

    Args:
        offset: The beginning of the range in bytes, from the beginning of the memory.
        size_bytes: The size of the range in bytes.

    Yields:
        The beginning and the end of each part in bytes, from the beginning of the range.
    """
    begin = 0
    while begin < size_bytes:
        end = min(size_bytes, begin + PIECE_BYTES - (offset + begin) % PIECE_BYTES)
        yield begin, end
        begin = end
