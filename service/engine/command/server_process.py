"""One server's processes, as its pool sees them: started, stopped, and how they ended."""

from __future__ import annotations

import asyncio
import logging
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.engine.command import process_keeper
from service.errors import ExpertFailedError

log = logging.getLogger("coe.engine")

_KEEPER = str(Path(process_keeper.__file__))
# The keeper itself needs nothing, and a run's processes are found by the second one.
_ENVIRONMENT = ("PATH", "RAY_AUTH_TOKEN_PATH")
_START_S = 30.0
# Time that killed processes may take to end; a driver may hold them for some seconds.
_KILLED_S = 20.0


@dataclass(frozen=True, slots=True)
class ServerOrder:
    """What to start.

    Attributes:
        argv: The program and its arguments.
        env: The whole environment.
        cwd: The working directory; None for the pool's.
        stop_signal: The number of the signal that asks the processes to stop.
        stop_timeout_s: Seconds until they are killed.
        log: The file for its output.
        log_bytes: Bytes of that file. The file before it is kept as well.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str | None
    stop_signal: int
    stop_timeout_s: float
    log: Path
    log_bytes: int

    def to_bytes(self) -> bytes:
        """Return the order as the keeper reads it."""
        parts = (
            self.argv,
            dict(self.env),
            self.cwd,
            self.stop_signal,
            self.stop_timeout_s,
            str(self.log),
            self.log_bytes,
        )
        data = marshal.dumps(parts)
        return b"%08d" % len(data) + data


class ServerProcess:
    """A server that was started, with all processes that come from it.

    Attributes:
        keeper_pid: The process above all of them.
        status: How the server ended, as in subprocess.Popen; None while it runs.
    """

    def __init__(self, order: ServerOrder, control: int, events: asyncio.StreamReader) -> None:
        self.keeper_pid = 0
        self.status: int | None = None
        self._order = order
        self._control: int | None = control
        self._events = events
        self._transport: asyncio.BaseTransport | None = None
        self._gone = asyncio.Event()
        self.ended = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, order: ServerOrder) -> ServerProcess:
        """Start a server.

        Raises:
            ExpertFailedError: The program is not there or can't be run.
        """
        starting = asyncio.ensure_future(cls._start(order))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The keeper may have started already. It has to be stopped as well.
            starting.add_done_callback(_stop_late)
            raise

    @classmethod
    async def _start(cls, order: ServerOrder) -> ServerProcess:
        control, events = await asyncio.to_thread(_launch, order)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        process = cls(order, control, reader)
        try:
            process._transport, _ = await loop.connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(events, "rb", buffering=0)
            )
            async with asyncio.timeout(_START_S):
                first = await process._next_event()
        except BaseException:
            process._release()
            raise
        if first[:1] != ["started"]:
            process._release()
            raise _not_started(order, first)
        process.keeper_pid = int(first[1])
        process._following = asyncio.create_task(process._follow())
        return process

    async def _next_event(self) -> list[str]:
        """Return the words of the keeper's next line; none where it has ended."""
        return (await self._events.readline()).decode().split()

    async def _follow(self) -> None:
        """Read what happens until no process is left."""
        try:
            while event := await self._next_event():
                if event[0] == "exited":
                    self.status = int(event[1])
                    self.ended.set()
        finally:
            if self.status is None:
                # The keeper was killed, and the server with it.
                self.status = -signal.SIGKILL
            self.ended.set()
            self._gone.set()
            self._release()

    def _release(self) -> None:
        """Close both pipes. The keeper then stops whatever is left."""
        control, self._control = self._control, None
        if control is not None:
            os.close(control)
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    async def stop(self) -> None:
        """Stop the server, and wait until it and all its processes have gone."""
        control, self._control = self._control, None
        if control is not None:
            os.close(control)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._order.stop_timeout_s + _KILLED_S):
                await self._gone.wait()
        if not self._gone.is_set():
            log.error(
                "processes of %s are left %.0f s after SIGKILL", self._order.argv[0], _KILLED_S
            )

    @property
    def is_gone(self) -> bool:
        """Whether the server and all its processes have ended."""
        return self._gone.is_set()


def _launch(order: ServerOrder) -> tuple[int, int]:
    """Start a keeper with its order, and return the control pipe and the pipe of its events."""
    control_read, control_write = os.pipe()
    events_read, events_write = os.pipe()
    try:
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", _KEEPER],
            stdin=control_read,
            stdout=events_write,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        )
    except BaseException:
        os.close(control_write)
        os.close(events_read)
        raise
    finally:
        os.close(control_read)
        os.close(events_write)
    # The first process ends as soon as it has made the keeper.
    keeper.wait()
    line = order.to_bytes()
    with suppress(BrokenPipeError):
        while line:
            line = line[os.write(control_write, line) :]
    return control_write, events_read


def _stop_late(starting: asyncio.Future[ServerProcess]) -> None:
    """Stop a server that was started for a caller that did not wait."""
    if not starting.cancelled() and starting.exception() is None:
        starting.result()._release()


def _not_started(order: ServerOrder, event: Sequence[str]) -> ExpertFailedError:
    """Return the error for a server that never ran. `event` is what its keeper told."""
    if len(event) != 3:
        return ExpertFailedError("its keeper ended before it had started it", retry_after_s=30)
    why = os.strerror(int(event[1]))
    if event[2] == "log":
        return ExpertFailedError(f"its log can't be written: {why}", retry_after_s=30)
    what = f"folder {order.cwd}" if event[2] == "cwd" else f"program {order.argv[0]}"
    return ExpertFailedError(f"its {what} can't be used: {why}", retry_after_s=30)


def ending(status: int) -> str:
    """Describe how a process ended."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
