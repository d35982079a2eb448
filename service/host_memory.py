"""The memory of this machine, or of the container that this process is in, in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Of version 2 and of version 1: the bound, and what is in use.
_BOUNDS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def total_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """All that there is."""
    return min([_told("MemTotal", meminfo), *(bound for bound, _ in _bounds(cgroup))])


def free_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """What can still be taken."""
    left = [bound - used for bound, used in _bounds(cgroup)]
    return max(0, min([_told("MemAvailable", meminfo), *left]))


def _told(name: str, meminfo: Path) -> int:
    told = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(told[name].split()[0]) * 1024


def _bounds(cgroup: Path) -> list[tuple[int, int]]:
    found = []
    for bound, used in _BOUNDS:
        # Another version, or "max".
        with contextlib.suppress(OSError, ValueError):
            found.append((int((cgroup / bound).read_text()), int((cgroup / used).read_text())))
    return found
