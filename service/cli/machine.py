"""What this machine has: accelerators, memory, disk, cores."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from service import host_memory

_MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What a composition has to fit into."""

    gpus: tuple[Gpu, ...]
    memory_bytes: int
    disk_bytes: int
    cores: int


def look(models_dir: Path) -> Machine:
    """This machine; `models_dir` is where models would be kept."""
    there = models_dir
    while not there.exists():
        there = there.parent
    return Machine(
        gpus(),
        host_memory.total_bytes(),
        shutil.disk_usage(there).free,
        len(os.sched_getaffinity(0)),
    )


def gpus() -> tuple[Gpu, ...]:
    """NVIDIA's, as their own tool tells; none where there is no such tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return read_gpus(told.stdout)


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Lines of name and MiB."""
    found = []
    for line in text.splitlines():
        name, comma, memory = line.rpartition(",")
        if comma and memory.strip().isdigit():
            found.append(Gpu(name.strip(), int(memory) * _MIB))
    return tuple(found)
