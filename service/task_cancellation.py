"""Cancelling asyncio tasks."""

from __future__ import annotations

import asyncio
from typing import Any

_REPEAT_S = 0.5


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, again and again until all are done.

    One cancellation may not be enough: the Redis client may swallow one that comes while it waits
    for a reply.
    """
    left = {task for task in tasks if task is not None}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_REPEAT_S)
