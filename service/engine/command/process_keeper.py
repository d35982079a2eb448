"""The program that starts one server, keeps its log, and ends it with every process it has made.

A pool starts it as `python -I -S process_keeper.py`, writes its order to its standard input, and
closes that to have the server stopped. The end of the pool closes it as well, however the pool
ends. It tells what happens as lines on its standard output:

    started KEEPER    the server runs; KEEPER is the process id of this program
    failed ERRNO run  its program can't be run (cwd: its folder can't be entered; log: its log
                      can't be written)
    exited STATUS     it has ended; the status is that of subprocess.Popen
    gone              no process is left

It leaves its parent (Ray kills the children of a worker that ends), and it is the *subreaper* of
all that comes from the server: a process that forks away and makes a session of its own becomes a
child of this one when its parent ends (`prctl(2)`, PR_SET_CHILD_SUBREAPER). So the tree below this
process always has all of them. The server gets SIGKILL if this process is killed.

A start waits for this program, so that it imports little: no json, no re, no enum.
"""

# contextlib would be a slow import.
# ruff: noqa: SIM105

from __future__ import annotations

import ctypes
import marshal
import os
import select
import time

# The module `signal` makes enums of these, which takes longer than all else here.
from _signal import (  # type: ignore[import-not-found]
    SIG_DFL,
    SIG_IGN,
    SIGCHLD,
    SIGHUP,
    SIGINT,
    SIGKILL,
    SIGPIPE,
    SIGTERM,
    set_wakeup_fd,
    signal,
)

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_READ_BYTES = 65536
_KILL_AGAIN_S = 0.02
# A pipe holds 64 KiB, and a process elsewhere could go on to fill it.
_LAST_READS = 16


def main() -> None:
    """Read the order, start the server, and stay until its last process has gone."""
    if os.fork():
        os._exit(0)
    os.setsid()
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    order = _read_order()
    if order is None:
        return
    try:
        log = Log(order.log, order.log_bytes)
    except OSError as error:
        _tell("failed", error.errno, "log")
        return
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    pid = _start(order, write_end, libc)
    os.close(write_end)
    if pid is not None:
        _tell("started", os.getpid())
        _Keeper(pid, read_end, log, order).run()


class Order:
    """What to start: the parts of `ServerOrder`."""

    def __init__(self, parts: tuple) -> None:  # type: ignore[type-arg]
        (
            self.argv,
            self.env,
            self.cwd,
            self.stop_signal,
            self.stop_timeout_s,
            self.log,
            self.log_bytes,
        ) = parts


def _read_order() -> Order | None:
    """Read the order: eight digits with its size, and its parts as `marshal` writes them.

    The pool runs the same Python, and nobody else can write to this pipe.
    """
    data = b""
    while len(data) < 8 or len(data) < 8 + int(data[:8]):
        piece = os.read(0, _READ_BYTES)
        if not piece:
            return None
        data += piece
    return Order(marshal.loads(data[8:]))


def _tell(*words: object) -> None:
    try:
        os.write(1, " ".join(map(str, words)).encode() + b"\n")
    except OSError:
        pass  # the pool has gone


def _start(order: Order, output: int, libc: ctypes.CDLL) -> int | None:
    """Start the server in a session of its own. Tell where that fails, and return None."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        stage = "cwd"
        try:
            os.setsid()
            libc.prctl(_PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
            signal(SIGPIPE, SIG_DFL)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for target, source in enumerate((nothing, output, output)):
                os.dup2(source, target)
            if order.cwd is not None:
                os.chdir(order.cwd)
            stage = "run"
            os.execvpe(order.argv[0], order.argv, order.env)
        except OSError as error:
            os.write(write_end, f"{error.errno} {stage}".encode())
        finally:
            os._exit(127)
    os.close(write_end)
    fault = os.read(read_end, 64)  # empty once the program runs, because the pipe closes
    os.close(read_end)
    if not fault:
        return pid
    os.waitpid(pid, 0)
    _tell("failed", fault.decode())
    return None


class Log:
    """A log file. It begins anew with each server, and when it is full; two before it are kept.

    Args:
        path: The file. Those before it are `PATH.1` and `PATH.2`.
        most_bytes: Bytes of one file.

    Raises:
        OSError: The file can't be written.
    """

    def __init__(self, path: str, most_bytes: int) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._file = -1
        self._begin()

    def _begin(self) -> None:
        for newer, older in ((".1", ".2"), ("", ".1")):
            if os.path.exists(self._path + newer):
                os.replace(self._path + newer, self._path + older)
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._file = file
        self._size = 0

    def write(self, data: bytes) -> None:
        """Add output. Output that the disk has no room for is lost."""
        try:
            if self._size and self._size + len(data) > self._most_bytes:
                self._begin()
            self._size += os.write(self._file, data)
        except OSError:
            pass


class _Keeper:
    def __init__(self, pid: int, output: int, log: Log, order: Order) -> None:
        self._pid = pid
        self._output = output
        self._log = log
        self._stop_signal = order.stop_signal
        self._stop_timeout_s = order.stop_timeout_s
        self._kill_at_s: float | None = None
        self._server_runs = True

    def run(self) -> None:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal(SIGCHLD, lambda number, frame: None)
        for number in (SIGINT, SIGTERM, SIGHUP):
            # Such a signal is for the service, which then closes the pipe.
            signal(number, SIG_IGN)
        watched = [0, self._output, wake_read]
        while self._reap():
            timeout_s = None
            if self._kill_at_s is not None:
                timeout_s = max(0.0, self._kill_at_s - time.monotonic())
                if timeout_s == 0:
                    _kill(_descendants())
                    timeout_s = _KILL_AGAIN_S
            ready, _, _ = select.select(watched, [], [], timeout_s)
            if wake_read in ready:
                _read(wake_read)
            if self._output in ready and not self._copy_output():
                watched.remove(self._output)
            if 0 in ready and not _read(0):
                watched.remove(0)
                self._stop()
        for _ in range(_LAST_READS):
            if not self._copy_output():
                break
        _tell("gone")

    def _reap(self) -> bool:
        """Reap processes that have ended. Return whether any is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._pid:
                self._server_runs = False
                self._copy_output()
                _tell("exited", os.waitstatus_to_exitcode(status))
                # Whatever is left serves nobody.
                self._kill_at_s = time.monotonic()

    def _stop(self) -> None:
        if self._kill_at_s is not None:
            return
        self._kill_at_s = time.monotonic() + self._stop_timeout_s
        if self._server_runs:
            try:
                os.killpg(self._pid, self._stop_signal)
            except OSError:
                pass

    def _copy_output(self) -> bool:
        """Copy a piece of the server's output to its log. Return whether there may be more now."""
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._log.write(data)
        return bool(data)


def _read(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    except BlockingIOError:
        return b""


def _descendants() -> list[int]:
    """Return the processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                # The name in parentheses may hold spaces and parentheses.
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    below = [os.getpid()]
    while below:
        below = [child for pid in below for child in children.get(pid, ())]
        found += below
    return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, SIGKILL)
        except OSError:
            pass


if __name__ == "__main__":
    main()
