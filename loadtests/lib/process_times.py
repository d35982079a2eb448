"""Processor time of a running service, by role: HAProxy, gateways, pools, encoders.

It says what a request costs even where other programs take part of the machine, which replies per
second do not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from loadtests.lib.machine_load import descendants

# Words of a command line by which each role is known.
_ROLES = {
    "gateway": (b"ServeReplica", b":gateway"),
    "pool": (b"ServeReplica", b":pool-"),
    "HAProxy": (b"haproxy.cfg",),
    "encoder": (b"service.encoder.encoder_worker",),
}


def role_of(command: bytes) -> str | None:
    """The role of a process by its command line; None of any other."""
    for role, words in _ROLES.items():
        if all(word in command for word in words):
            return role
    return None


def processor_ms(pids: Iterable[int], proc: Path = Path("/proc")) -> dict[str, float]:
    """Milliseconds that these processes have used so far, by role, threads included.

    Args:
        pids: The processes; those without a role, or that have ended, are left out.
        proc: Where the kernel tells of processes.
    """
    used: dict[str, float] = {}
    for pid in pids:
        with suppress(OSError):
            role = role_of((proc / str(pid) / "cmdline").read_bytes())
            if role is None:
                continue
            for thread in os.listdir(proc / str(pid) / "task"):
                with suppress(OSError):
                    told = (proc / str(pid) / "task" / thread / "schedstat").read_text()
                    used[role] = used.get(role, 0.0) + int(told.split()[0]) / 1e6
    return used


def tree_ms(pid: int) -> float:
    """Milliseconds of processor time of a process and all that it has started, so far.

    Processes that have ended are left out, so two of these differ by what those did that live.
    """
    used = 0.0
    for process in descendants(pid):
        for task in Path(f"/proc/{process}/task").glob("*/schedstat"):
            with suppress(OSError):
                used += int(task.read_text().split()[0]) / 1e6
    return used


def tree_bytes(pid: int) -> int:
    """Memory of a process and all that it has started; a shared page counts once for all of them.

    It is the sum of the proportional set sizes.
    """
    held = 0
    for process in descendants(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    held += int(line.split()[1]) * 1024
    return held


class ServiceTimes:
    """The processor time of one service, since this object was made.

    Args:
        pid: `coe serve`; its descendants are the service.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = processor_ms(descendants(pid))

    def per_request(self, requests: int) -> Mapping[str, float]:
        """Milliseconds of each role for each of so many requests."""
        now = processor_ms(descendants(self._pid))
        return {role: (now[role] - self._before.get(role, 0.0)) / requests for role in sorted(now)}
