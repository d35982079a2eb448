"""Turns of a load between two steps of the running model.

Some parts of a load must not run beside the running model: they set what holds for the whole
process (torch's default dtype, vLLM's current config), or launch kernels. The load's thread hands
such a part over and waits. The worker's thread runs it when the engine asks how far the load is,
which is between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# How long the worker waits for the next part while it has time left, in seconds.
_NEXT_S = 0.001


@dataclass(slots=True)
class _Part:
    run: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class StepTurns:
    """Hands parts from one load's thread to the worker's thread.

    Attributes:
        longest_s: The longest duration of one part, for which the running model waited.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._part: _Part | None = None
        self._handed = threading.Condition()

    def take(self, run: Callable[[], None]) -> None:
        """Let the worker's thread run a part, and wait for its end. Called by the load's thread.

        Raises:
            BaseException: Any error of the part.
        """
        part = _Part(run)
        with self._handed:
            self._part = part
            self._handed.notify_all()
        part.done.wait()
        if part.error is not None:
            raise part.error

    def serve(self, budget_s: float) -> None:
        """Run parts until the time is over or no part comes. Called by the worker's thread.

        At least one part runs, however long it takes, so that a load always ends.
        """
        until_s = time.monotonic() + budget_s
        wait_s = 0.0  # a load without parts costs the running model nothing
        while (part := self._next(wait_s)) is not None:
            wait_s = _NEXT_S
            began_s = time.monotonic()
            try:
                part.run()
            except BaseException as error:
                part.error = error
            ended_s = time.monotonic()
            self.longest_s = max(self.longest_s, ended_s - began_s)
            part.done.set()
            if ended_s >= until_s:
                return

    def _next(self, wait_s: float) -> _Part | None:
        with self._handed:
            self._handed.wait_for(lambda: self._part is not None, wait_s)
            part, self._part = self._part, None
            return part
