"""`python -m loadtests.swap_gpu.pinned_copies BYTES TIMES [DEVICE]`: what the bus can do.

It prints the seconds of each copy from pinned memory to a device, as a JSON list.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

_CHUNK_BYTES = 1 << 30


def copy_s(size: int, times: int, device: str = "cuda") -> list[float]:
    """Return the seconds of copying so many bytes from pinned memory, a gigabyte at a time."""
    import torch

    on_gpu = device != "cpu"
    chunk = min(size, _CHUNK_BYTES)
    source = torch.ones(chunk, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.zeros(chunk, dtype=torch.uint8, device=device)
    took = []
    for _ in range(times + 1):
        if on_gpu:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        for at in range(0, size, chunk):
            part = min(chunk, size - at)
            target[:part].copy_(source[:part], non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began_s)
    return took[1:]


def copy_apart_s(size: int, times: int, device: str = "cuda") -> list[float]:
    """Run `copy_s` in a process of its own, which leaves nothing on the GPU.

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "loadtests.swap_gpu.pinned_copies", str(size), str(times)]
    done = subprocess.run([*command, device], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"copying from pinned memory failed: {done.stderr[-1000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


if __name__ == "__main__":
    print(json.dumps(copy_s(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
