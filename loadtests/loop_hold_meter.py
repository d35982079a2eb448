"""Measures how long callbacks hold an event loop, in processor time of its thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any


class HoldMeter:
    """Measures every callback of every asyncio loop of the process within its context.

    It measures the processor time of the loop's own thread, so that a busy machine does not count.
    Loops without Python's `asyncio.Handle`, such as uvloop's, are not measured.

    `collections`: garbage collections count. Their time depends on all that the process holds, so a
    test that shares its process with what is measured leaves them out.
    """

    def __init__(self, *, collections: bool = True) -> None:
        self._collections = collections
        self._collecting_since_s = 0.0
        self._collected_s = 0.0
        self._thread = 0
        self.longest_s = 0.0
        self.where = ""
        self.callbacks = 0
        self._real: Any = None

    def reset(self) -> None:
        """Begin anew."""
        self.longest_s, self.where, self.callbacks = 0.0, "", 0

    def __enter__(self) -> HoldMeter:
        self._real = real = asyncio.Handle._run

        def run(handle: asyncio.Handle) -> None:
            self._thread = threading.get_ident()
            began_s, self._collected_s = time.thread_time(), 0.0
            try:
                real(handle)
            finally:
                held_s = time.thread_time() - began_s
                if not self._collections:
                    held_s -= self._collected_s
                self.callbacks += 1
                if held_s > self.longest_s:
                    self.longest_s, self.where = held_s, _name(handle)

        asyncio.Handle._run = run  # type: ignore[assignment, method-assign]
        gc.callbacks.append(self._collects)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.Handle._run = self._real  # type: ignore[method-assign]
        gc.callbacks.remove(self._collects)

    def _collects(self, phase: str, _: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._collecting_since_s = time.thread_time()
        else:
            self._collected_s += time.thread_time() - self._collecting_since_s


def _name(handle: asyncio.Handle) -> str:
    """Return a callback's name: for a task its coroutine's, without arguments."""
    callback = handle._callback  # type: ignore[attr-defined]
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return getattr(owner.get_coro(), "__qualname__", "a task")
    return getattr(callback, "__qualname__", type(callback).__name__)
