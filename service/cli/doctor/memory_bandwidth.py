"""The bandwidth of memory, as the yardstick of loads and swaps."""

from __future__ import annotations

import statistics
import time

_BYTES = 256 * 1024**2
_TIMES = 5


def memory_bytes_per_s(*, on_cpu: bool) -> float:
    """Measure copies of 256 MiB: from pinned memory to the GPU, or within memory on a CPU."""
    import torch

    if on_cpu:
        source = torch.ones(_BYTES, dtype=torch.uint8)
        target = torch.zeros(_BYTES, dtype=torch.uint8)
    else:
        source = torch.ones(_BYTES, dtype=torch.uint8, pin_memory=True)
        target = torch.zeros(_BYTES, dtype=torch.uint8, device="cuda")
    took = []
    for _ in range(_TIMES + 1):
        began_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if not on_cpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began_s)
    return _BYTES / statistics.median(took[1:])  # the first touches new pages
