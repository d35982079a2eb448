"""An event loop on a virtual clock: asyncio code runs as it is, and waiting takes no time.

`time.monotonic` follows the loop's clock while the loop runs, so that code which reads it sees the
same time as code which sleeps. There is no I/O on this loop and there are no threads. Processor
time is real: `time.thread_time` and `time.perf_counter` are not changed.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class StandstillError(RuntimeError):
    """Every task waits for another one, so that time would stand still for ever."""


class _ClockSelector(selectors.SelectSelector):
    """Moves the clock on instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Let the time pass until the next timer of the loop.

        Raises:
            StandstillError: There is no timer.
        """
        if timeout is None:
            raise StandstillError("no task can go on: each of them waits for another one")
        self.now_s += max(0.0, timeout)
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """A loop whose clock begins at 0 and runs on to the next timer whenever nothing is to do."""

    def __init__(self) -> None:
        self._clock_selector = _ClockSelector()
        super().__init__(self._clock_selector)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._clock_selector.now_s


@contextmanager
def _monotonic_of(loop: VirtualClockLoop) -> Iterator[None]:
    real = time.monotonic
    time.monotonic = loop.time
    try:
        yield
    finally:
        time.monotonic = real


def run_on_virtual_clock(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a clock of its own, and cancel the tasks that it leaves.

    Raises:
        StandstillError: Every task waits for another one.
    """
    loop = VirtualClockLoop()
    with _monotonic_of(loop):
        asyncio.set_event_loop(loop)
        try:
            return loop.run_until_complete(main)
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            asyncio.set_event_loop(None)
            loop.close()
