"""Reports the progress of a pull: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol

_POLL_S = 0.2
_LINE_EVERY_S = 5.0


class Progress(Protocol):
    """The receiver of a pull's progress."""

    def note(self, text: str) -> None:
        """Report the present step in one line."""

    def stage(
        self, label: str, total_bytes: int | None
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a step of known length. The value is a callback for each number of bytes done."""


class Silent:
    """Reports nothing."""

    def note(self, text: str) -> None:
        del text

    @contextmanager
    def stage(self, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        del label, total_bytes
        yield lambda _: None


class Lines:
    """Plain lines at the begin and the end of a step, and every few seconds in between."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def stage(self, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        started = last = time.monotonic()
        done = 0
        self.note(f"{label} ({total_bytes / 1e6:.0f} MB) ..." if total_bytes else f"{label} ...")

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.monotonic()
            if now - last >= _LINE_EVERY_S:
                last = now
                share = f", {100 * done / total_bytes:.0f} %" if total_bytes else ""
                self.note(f"{label}: {done / 1e6:.0f} MB{share}")

        yield advance
        self.note(f"{label}: done in {time.monotonic() - started:.1f} s")


class ProgressBar:
    """A rich progress bar."""

    def __init__(self, stream: IO[str]) -> None:
        from rich.console import Console

        self._console = Console(file=stream)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    @contextmanager
    def stage(self, label: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        from rich import progress as rich_progress

        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=self._console) as bar:
            task = bar.add_task(label, total=total_bytes)
            yield lambda count: bar.advance(task, count)


def progress_for(stream: IO[str] | None = None) -> Progress:
    """Return a bar where `stream` (default: stderr) is a terminal, and plain lines elsewhere."""
    stream = stream if stream is not None else sys.stderr
    return ProgressBar(stream) if stream.isatty() else Lines(stream)


@contextmanager
def watch_folder(
    folder: Path, advance: Callable[[int], None], *, limit_bytes: int
) -> Iterator[None]:
    """Report how `folder` grows while another program downloads into it.

    The reported size stops at `limit_bytes`, because pip briefly holds the file twice. pip and the
    hub client draw their own bars and have no callback that is stable over versions. The size on
    disk is therefore measured.
    """
    stop = threading.Event()
    seen = folder_bytes(folder)

    def report() -> None:
        nonlocal seen
        now = min(folder_bytes(folder), limit_bytes)
        if now > seen:
            advance(now - seen)
            seen = now

    def loop() -> None:
        while not stop.wait(_POLL_S):
            report()

    watcher = threading.Thread(target=loop, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        report()


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.stat().st_size
        except OSError:
            continue  # the file was removed after it was listed
    return total
