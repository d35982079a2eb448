"""A container's bound counts, not its machine's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.host_memory import free_bytes, total_bytes

KIB = 1024


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        ({}, 8000, 5000),
        ({"memory.max": "max", "memory.current": "1"}, 8000, 5000),
        ({"memory.max": 3000 * KIB, "memory.current": 1000 * KIB}, 3000, 2000),
        ({"memory.max": 7000 * KIB, "memory.current": 6900 * KIB}, 7000, 100),
        (
            {
                "memory/memory.limit_in_bytes": 4000 * KIB,
                "memory/memory.usage_in_bytes": 4100 * KIB,
            },
            4000,
            0,
        ),
    ],
)
def test_bounds(tmp_path: Path, files: dict[str, object], total: int, free: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\n")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(text))
    assert total_bytes(meminfo=meminfo, cgroup=tmp_path) == total * KIB
    assert free_bytes(meminfo=meminfo, cgroup=tmp_path) == free * KIB
