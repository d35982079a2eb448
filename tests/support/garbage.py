"""Garbage collection of what one example of a test made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected() -> Iterator[None]:
    """Collect the garbage of a block at its end, so that what was never awaited is told.

    Objects from before the block are not looked at again, in this search and in later ones: after
    thousands of tests in one process that takes a second each time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.collect()
