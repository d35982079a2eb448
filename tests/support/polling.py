"""Polling for a condition that has no event to wait for."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable


async def until(
    condition: Callable[[], object | Awaitable[object]], what: str, timeout_s: float = 60
) -> None:
    """Poll until the condition is true.

    Raises:
        AssertionError: The condition was still false after `timeout_s`; `what` names it.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                met = condition()
                if await met if inspect.isawaitable(met) else met:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None
