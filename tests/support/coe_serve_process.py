"""The whole service, as `coe serve` starts it: Ray Serve, HAProxy, gateway and pools."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

_PORTS = range(8300, 8400)


@dataclass(frozen=True)
class Listening:
    """One listening socket, and whose it is."""

    process: str
    address: str
    port: int


@dataclass
class Service:
    """A running `coe serve`. Everything it writes is in `folder`."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    seen: set[psutil.Process] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def run_dir(self) -> Path:
        """Where the service keeps its files while it runs."""
        found = re.search(r"logs in (\S+)", self.log)
        assert found, self.log
        return Path(found[1])

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Its processes now; they are remembered."""
        found: list[psutil.Process] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            me = psutil.Process(self.process.pid)
            found = [me, *me.children(recursive=True)]
        self.seen.update(found)
        return found

    def named(self, part: str) -> list[psutil.Process]:
        """Those of its processes whose title or command has `part` in it."""
        return [p for p in self.tree() if part in _title(p)]

    def listening(self) -> set[Listening]:
        """Every TCP socket that it listens on."""
        found = set()
        for process in self.tree():
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add(
                            Listening(_title(process), connection.laddr.ip, connection.laddr.port)
                        )
        return found

    def left(self) -> list[str]:
        """Its processes that are still there, once it has stopped."""
        there = {p for p in self.seen if _alive(p)}
        for process in psutil.process_iter():
            if str(self.run_dir) in _title(process):
                there.add(process)
        return [_title(process) for process in there]

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 90) -> None:
        """Ask it to stop, and wait until it has."""
        self.tree()
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(timeout_s)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip() or process.name()
    except psutil.Error:
        return ""


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Look again and again; an AssertionError says what never happened."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"never happened: {what}"
        time.sleep(0.1)


def free_port() -> int:
    """A port that nobody listens on."""
    for port in _PORTS:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no free port in {_PORTS}")


@contextmanager
def serve(config: Path, *, ready_s: float = 250) -> Iterator[Service]:
    """`coe serve` with a config, until it says that it is ready; stopped at the end."""
    folder = Path(tempfile.mkdtemp(prefix="coe-test-"))
    port = free_port()
    environment = os.environ | {"COE_HOME": str(folder / "home")}
    environment.pop("RAY_ADDRESS", None)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.cli", "serve", "-c", str(config), "--port", str(port)],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    service = Service(process, port, folder)
    try:
        wait_until(
            lambda: f"ready: {service.url}" in service.log or process.poll() is not None,
            "the service is ready",
            ready_s,
        )
        assert process.poll() is None, service.log
        service.tree()
        yield service
    except BaseException:
        sys.stderr.write(service.log[-8000:])
        raise
    finally:
        try:
            service.stop()
        finally:
            for item in service.seen:
                with contextlib.suppress(psutil.Error):
                    item.kill()
            shutil.rmtree(folder, ignore_errors=True)
