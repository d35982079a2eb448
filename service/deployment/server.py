"""The HTTP server of a pool's own port, inside a process that belongs to Serve."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

_PORTS = range(31100, 32000)


class QuietServer(uvicorn.Server):
    """uvicorn that leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are Serve's business."""
        yield


def server_config(app: Any) -> uvicorn.Config:
    """How pools (and gateways without Serve) are served."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )


def bind_free_port(host: str) -> socket.socket:
    """A listening socket on a free port of ours. Raises OSError when all are taken."""
    ports = list(_PORTS)
    random.shuffle(ports)
    for port in ports:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.bind((host, port))
        except OSError:
            listener.close()
            continue
        listener.set_inheritable(False)
        return listener
    raise OSError(f"no free port in {_PORTS.start}-{_PORTS.stop - 1} on {host}")
