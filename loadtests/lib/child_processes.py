"""Programs that a load test starts: waits until they answer, and stops all of them."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from service.rpc.local_paths import admin_key_path

_POLL_S = 0.25
_STOP_S = 90.0


def say(text: str) -> None:
    """Progress, for people."""
    print(f"loadtests: {text}", file=sys.stderr, flush=True)


def admin_key_of(home: Path | None = None) -> str:
    """The admin key in a service's COE_HOME, by default this process's; empty: none yet."""
    path = home / "admin-key" if home is not None else admin_key_path()
    return path.read_text().strip() if path.is_file() else ""


def fetch(
    port: int,
    path: str,
    timeout_s: float = 5.0,
    *,
    admin_key: str = "",
    host: str = "127.0.0.1",
) -> tuple[int, bytes]:
    """GET, by default from this machine: status (0 where nobody answers) and body."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    ready: Callable[[], bool],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[Any]]:
    """A program that answers, stopped at the end with SIGTERM.

    Raises RuntimeError with the end of its output if it does not come up.
    """
    if ready():
        raise RuntimeError(f"something else answers already where {name} should; see --port")
    with tempfile.NamedTemporaryFile(prefix=f"loadtests-{name}-", suffix=".log") as log:
        began_s = time.monotonic()
        process = subprocess.Popen(
            list(command),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})},
            # Its own group, to be stopped as a whole; our session, to be scheduled and
            # counted like everything else here (see machine_load.py).
            process_group=0,
        )
        try:
            while not ready():
                if process.poll() is not None:
                    raise RuntimeError(f"{name} ended:\n{_tail(Path(log.name))}")
                if time.monotonic() - began_s > timeout_s:
                    raise RuntimeError(f"{name} was not ready:\n{_tail(Path(log.name))}")
                time.sleep(_POLL_S)
            say(f"{name} is ready ({time.monotonic() - began_s:.0f} s)")
            yield process
        finally:
            _stop(process)


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-3000:]


def _stop(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    # Its own group: nothing but what it started is in there.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
