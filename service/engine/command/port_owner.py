"""Free ports, and whose process listens on one. Linux only.

A port is chosen by binding to port 0. Between that and the server's own bind another process may
take it, and prompts must not go there. So the listener is looked up once it answers:
`/proc/net/tcp` has the inode of its socket, and `/proc/PID/fd` of the server's processes has their
sockets.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress

import psutil

_LISTEN = "0A"


def free_port(host: str) -> int:
    """Return a port that nobody has now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_owner(above: int, port: int) -> bool:
    """Return whether processes below `above` have all sockets that listen on a port.

    The result is False where nobody listens. The sockets of root count as theirs where this process
    is another user's, because root's processes can't be looked into.
    """
    sockets = dict(_listening(port))
    if os.getuid() != 0 and sockets and all(uid == 0 for uid in sockets.values()):
        return True
    return bool(sockets) and sockets.keys() <= _sockets_of(_below(above))


def is_taken(port: int) -> bool:
    """Return whether some process listens on a port."""
    return any(True for _ in _listening(port))


def _listening(port: int) -> Iterable[tuple[int, int]]:
    """Yield the inode and the user of each socket that listens on a port."""
    wanted = f":{port:04X}"
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with suppress(OSError), open(table) as lines:
            for line in lines:
                if wanted not in line:
                    continue
                fields = line.split()
                if fields[3] == _LISTEN and fields[1].endswith(wanted):
                    yield int(fields[9]), int(fields[7])


def _below(pid: int) -> list[int]:
    with suppress(psutil.Error):
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return []


def _sockets_of(pids: Iterable[int]) -> set[int]:
    found = set()
    for pid in pids:
        with suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError, ValueError):
                    target = os.readlink(entry.path)
                    if target.startswith("socket:["):
                        found.add(int(target[8:-1]))
    return found
