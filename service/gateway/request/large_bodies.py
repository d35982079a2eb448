"""Where work on a body runs: a large one must not delay running streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LARGE_BYTES = 128 * 1024


async def apart(work: Callable[[], T], size: int) -> T:
    """Do work on a body, in a thread where the body is large.

    Args:
        work: The work.
        size: The body's bytes.
    """
    return await asyncio.to_thread(work) if size > _LARGE_BYTES else work()
