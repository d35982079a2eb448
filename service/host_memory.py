"""Host memory of this machine, or of the container of this process, in bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Limit and usage in cgroup version 2, and in version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def total_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Total memory."""
    return min(
        [_meminfo_bytes("MemTotal", meminfo), *(bound for bound, _ in _cgroup_limits(cgroup))]
    )


def free_bytes(*, meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory that is still available."""
    left = [bound - used for bound, used in _cgroup_limits(cgroup)]
    return max(0, min([_meminfo_bytes("MemAvailable", meminfo), *left]))


def _meminfo_bytes(name: str, meminfo: Path) -> int:
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _cgroup_limits(cgroup: Path) -> list[tuple[int, int]]:
    found = []
    for bound, used in _CGROUP_FILES:
        # The file is missing in the other version, or holds "max".
        with contextlib.suppress(OSError, ValueError):
            found.append((int((cgroup / bound).read_text()), int((cgroup / used).read_text())))
    return found
