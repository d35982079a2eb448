"""Cores for what is measured and for what measures, so that neither takes the other's time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from loadtests.lib.machine_load import descendants


def two_cores() -> tuple[int, int]:
    """Two cores that this process may use: the load generator's, and that of the measured.

    Raises RuntimeError if there is only one.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RuntimeError("one core is not enough: the load generator needs one of its own")
    return cores[0], cores[-1]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """This thread, and the processes that it starts meanwhile, stay on this core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def check_pinned(pid: int, core: int) -> None:
    """Raise RuntimeError if a process, or one that it has started, may leave this core."""
    for process in descendants(pid):
        with suppress(ProcessLookupError):
            if (cores := os.sched_getaffinity(process)) != {core}:
                raise RuntimeError(f"process {process} may use cores {sorted(cores)}, not {core}")
