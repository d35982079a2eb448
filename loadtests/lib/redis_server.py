"""A Redis of a load test's own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import RedisError

from loadtests.lib.child_processes import running


@contextmanager
def redis_server(port: int) -> Iterator[Redis]:
    """A Redis of our own. Raises RuntimeError where there is no server to start."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise RuntimeError("redis-server (or valkey-server) is needed: install Debian's package")
    client = Redis(port=port, decode_responses=True, socket_timeout=1)

    def ready() -> bool:
        try:
            return bool(client.ping())
        except (RedisError, OSError):
            return False

    with tempfile.TemporaryDirectory(prefix="loadtests-redis-") as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--appendonly", "yes"]
        with running("redis", command, ready, timeout_s=20), client:
            yield client
