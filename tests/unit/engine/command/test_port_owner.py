from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from service.engine.command.port_owner import free_port, is_owner, is_taken

_LISTEN = (
    "import socket, sys, time\n"
    "s = socket.socket({family})\n"
    "s.bind(({host!r}, 0)); s.listen()\n"
    "print(s.getsockname()[1], flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.mark.parametrize(
    ("family", "host"),
    [("socket.AF_INET", "127.0.0.1"), ("socket.AF_INET", "0.0.0.0"), ("socket.AF_INET6", "::1")],
)
def test_is_owner_tells_whose_process_listens(family: str, host: str) -> None:
    code = _LISTEN.format(family=family, host=host)
    # Its parent is a shell, so that it is no child of this process.
    shell = subprocess.Popen(
        ["sh", "-c", f'{sys.executable} -c "$CODE"; true'],
        stdout=subprocess.PIPE,
        env={**os.environ, "CODE": code},
        start_new_session=True,
    )
    try:
        assert shell.stdout is not None
        port = int(shell.stdout.readline())
        assert is_taken(port)
        assert is_owner(shell.pid, port)
        assert is_owner(os.getpid(), port)
        other = subprocess.Popen(["sleep", "60"])
        assert not is_owner(other.pid, port)
        other.kill()
        other.wait()
    finally:
        os.killpg(shell.pid, 9)
        shell.wait()
        if shell.stdout is not None:
            shell.stdout.close()
    assert not is_owner(os.getpid(), port)


def test_free_port_is_not_taken() -> None:
    port = free_port("127.0.0.1")
    assert not is_taken(port)
    with socket.socket() as own:
        own.bind(("127.0.0.1", port))
        assert not is_taken(port)  # it is bound, and does not listen
        own.listen()
        assert is_taken(port)
