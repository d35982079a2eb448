"""The GPUs of this machine, as nvidia-smi lists them."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that nvidia-smi lists; none without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return read_gpus(result.stdout)


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse lines of name and MiB."""
    found = []
    for line in text.splitlines():
        name, comma, memory = line.rpartition(",")
        if comma and memory.strip().isdigit():
            found.append(Gpu(name.strip(), int(memory) * _MIB))
    return tuple(found)


def largest_gpu_bytes() -> int | None:
    """Return the memory of the largest GPU here, or None without nvidia-smi."""
    return max((gpu.memory_bytes for gpu in gpus()), default=None)
