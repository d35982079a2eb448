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
# A gateway whose machine has gone leaves its connections open. Probes find that out in 11 s, and
# requests that nobody waits for leave the queue. Time to the first, between two, their number.
_PROBES = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


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
        # Only gateways call, and nobody asks for their addresses.
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
        backlog=4096,
    )


def bind_free_port(host: str) -> socket.socket:
    """Bind a socket to a free port of the pools' range.

    Its connections are probed while they are silent.

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
        # Linux hands these options on to accepted connections.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
        return listener
    raise OSError(f"no free port in {_PORTS.start}-{_PORTS.stop - 1} on {host}")
