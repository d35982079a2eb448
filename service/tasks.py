"""Ending tasks that talk to a store."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 0.5


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks until all are done.

    More than once: Redis's client may swallow a cancellation that comes while it waits
    for an answer, and who waits for a task that goes on waits for ever.
    """
    left = {task for task in tasks if task is not None}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
