"""The resources of this machine: accelerators, memory, disk, cores."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from service import host_memory
from service.gpu_devices import Gpu, gpus


@dataclass(frozen=True, slots=True)
class Machine:
    """The resources that a composition has to fit into."""

    gpus: tuple[Gpu, ...]
    memory_bytes: int
    disk_bytes: int
    cores: int

    @property
    def largest_gpus(self) -> tuple[int, ...]:
        """The indices of the GPUs that have the most memory. A pool's replicas need equal ones."""
        most = max((gpu.memory_bytes for gpu in self.gpus), default=0)
        return tuple(i for i, gpu in enumerate(self.gpus) if gpu.memory_bytes == most)


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
