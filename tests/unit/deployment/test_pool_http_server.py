"""The listening socket of pools."""

from __future__ import annotations

import socket
from contextlib import closing

from service.deployment.pool_http_server import bind_free_port


def test_accepted_connections_are_probed_while_they_are_silent() -> None:
    with closing(bind_free_port("127.0.0.1")) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()) as client:
            accepted, peer = listener.accept()
            with closing(accepted):
                assert peer == client.getsockname()
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                idle, every, count = (
                    accepted.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                # Linux begins after two hours by default.
                assert 5 <= idle + every * count <= 15


def test_listeners_take_different_ports_of_the_range() -> None:
    with closing(bind_free_port("127.0.0.1")) as one, closing(bind_free_port("127.0.0.1")) as two:
        ports = {one.getsockname()[1], two.getsockname()[1]}
    assert len(ports) == 2
    assert ports <= set(range(31100, 32000))
