"""Processor time of the service's own code, by section, while a simulation runs around it."""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")


class CpuSections:
    """Adds up the thread's processor time of synchronous calls.

    A section within another one counts for itself only.

    Attributes:
        seconds: By section, processor time in s.
        calls: By section, how often it ran.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._inner_s = [0.0]

    @contextmanager
    def of(self, section: str) -> Iterator[None]:
        """Count what runs inside."""
        began_s = time.thread_time()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            took_s = time.thread_time() - began_s
            inner_s = self._inner_s.pop()
            self._inner_s[-1] += took_s
            self.seconds[section] += took_s - inner_s
            self.calls[section] += 1

    def measured(self, section: str, function: Callable[..., R]) -> Callable[..., R]:
        """Return a function that counts its calls."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            with self.of(section):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def patched(self, *names: tuple[object, str, str]) -> Iterator[None]:
        """Count the calls of functions of modules or classes: (holder, name, section)."""
        before = [(holder, name, getattr(holder, name)) for holder, name, _ in names]
        try:
            for holder, name, section in names:
                setattr(holder, name, self.measured(section, getattr(holder, name)))
            yield
        finally:
            for holder, name, function in before:
                setattr(holder, name, function)

    def reset(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.calls.clear()
