"""The resources of this machine: accelerators, memory, disk, cores."""

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
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources that a composition has to fit into."""

    gpus: tuple[Gpu, ...]
    memory_bytes: int
    disk_bytes: int
    cores: int


def inspect_machine(models_dir: Path) -> Machine:
    """Inspect this machine; the free disk space is that of `models_dir`."""
    existing = models_dir
    while not existing.exists():
        existing = existing.parent
    return Machine(
        gpus(),
        host_memory.total_bytes(),
        shutil.disk_usage(existing).free,
        len(os.sched_getaffinity(0)),
    )


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
