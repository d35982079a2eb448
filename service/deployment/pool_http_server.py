"""The HTTP server of a pool, inside a Serve replica's process."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from service.deployment.coalescing_protocol import CoalescingProtocol

_PORTS = range(31100, 32000)


class QuietServer(uvicorn.Server):
    """A uvicorn server that does not handle signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture no signals: Serve handles them."""
        yield


def server_config(app: Any) -> uvicorn.Config:
    """Return the uvicorn config of pools, and of gateways without Serve."""
    return uvicorn.Config(
        app,
        http=CoalescingProtocol,
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
    """Bind a socket to a free port of the pools' range.

    Raises:
        OSError: All ports are taken.
    """
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
