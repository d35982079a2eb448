"""Processor time by role, from what the kernel tells."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtests.lib.machine_load import descendants
from loadtests.lib.process_times import processor_ms, role_of, tree_bytes, tree_ms


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (b"ray::ServeReplica:coe:gateway", "gateway"),
        (b"ray::ServeReplica:coe:pool-cpu", "pool"),
        (b"/usr/sbin/haproxy\0-db\0-f\0/tmp/x/haproxy.cfg\0", "HAProxy"),
        (b"python\0-m\0service.encoder.encoder_worker\0/x\0001\000128\0", "encoder"),
        (b"ray::ServeController.listen_for_change", None),
        (b"python\0-m\0service.cli\0serve\0", None),
    ],
)
def test_role_of_a_command_line(command: bytes, role: str | None) -> None:
    assert role_of(command) == role


def test_processor_ms_adds_threads_and_processes_of_a_role(tmp_path: Path) -> None:
    for pid, name in ((1, "coe:gateway"), (2, "coe:gateway"), (3, "coe:pool-a"), (4, "other")):
        for thread in (1, 2):
            task = tmp_path / str(pid) / "task" / str(thread)
            task.mkdir(parents=True)
            (task / "schedstat").write_text(f"{pid * thread}000000 7 9\n")
        (tmp_path / str(pid) / "cmdline").write_bytes(b"ray::ServeReplica:%b" % name.encode())
    assert processor_ms([1, 2, 3, 4, 5], tmp_path) == {"gateway": 1 + 2 + 2 + 4, "pool": 3 + 6}


def test_descendants_are_found_through_their_parents() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    outer = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    try:
        end_s = time.monotonic() + 60
        while len(found := descendants(outer.pid)) < 2 and time.monotonic() < end_s:
            time.sleep(0.05)
        assert len(found) == 2
        assert outer.pid in found
        assert set(found) < set(descendants(os.getpid()))
    finally:
        outer.communicate(b"\n")


def test_tree_counts_what_a_child_uses_and_holds() -> None:
    inner = "x = bytearray(60_000_000); sum(range(3_000_000)); print('done', flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert tree_bytes(process.pid) > 60_000_000
        child = next(pid for pid in descendants(process.pid) if pid != process.pid)
        assert tree_ms(process.pid) > tree_ms(child) > 5
    finally:
        process.communicate(b"\n")
