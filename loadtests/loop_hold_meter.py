"""How long single callbacks hold an event loop, in processor time of its thread."""

from __future__ import annotations

import asyncio
import time
from typing import Any


class HoldMeter:
    """While its context lasts, every callback of every asyncio loop of the process is timed.

    What is measured is the processor time of the loop's own thread: a full machine does not count.
    Loops that do not run Python's `asyncio.Handle` (uvloop's) are not seen.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.where = ""
        self.callbacks = 0
        self._real: Any = None

    def reset(self) -> None:
        """Begin anew."""
        self.longest_s, self.where, self.callbacks = 0.0, "", 0

    def __enter__(self) -> HoldMeter:
        self._real = real = asyncio.Handle._run

        def run(handle: asyncio.Handle) -> Any:
            began_s = time.thread_time()
            try:
                return real(handle)
            finally:
                held_s = time.thread_time() - began_s
                self.callbacks += 1
                if held_s > self.longest_s:
                    self.longest_s, self.where = held_s, _name(handle)

        asyncio.Handle._run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.Handle._run = self._real  # type: ignore[method-assign]


def _name(handle: asyncio.Handle) -> str:
    """What a callback belongs to: of a task its coroutine's name, never its arguments."""
    callback = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return getattr(owner.get_coro(), "__qualname__", "a task")
    return getattr(callback, "__qualname__", type(callback).__name__)
