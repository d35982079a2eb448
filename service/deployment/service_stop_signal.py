"""Tells a stop of the whole service from the removal of one replica.

Ray Serve stops a replica in the same way in both cases. A removed replica lets its requests end for
as long as they need; when the service stops, somebody waits. `coe serve` therefore leaves a file
beside the cluster's secret before it stops the application. On other clusters there is no such
file: there the time that a node or pod gets to leave ends a replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_POLL_S = 0.25


class EndOfService:
    """The end of the service, as its processes learn of it.

    Args:
        secret_path: File with the cluster's secret.
    """

    def __init__(self, secret_path: Path) -> None:
        self._file = secret_path.parent / "stopping"

    def announce(self) -> None:
        """Tell every process on this machine that the service stops."""
        self._file.touch()

    @property
    def announced(self) -> bool:
        """Whether the service stops."""
        return self._file.exists()

    async def wait(self) -> None:
        """Wait until the service stops."""
        while not self.announced:  # noqa: ASYNC110  # another process makes the file
            await asyncio.sleep(_POLL_S)

    async def wait_for_requests(self, left: Callable[[], int], timeout_s: float) -> None:
        """Wait until no request is left, the service stops, or `timeout_s` seconds have passed."""
        end_s = time.monotonic() + timeout_s
        while left() and not self.announced and time.monotonic() < end_s:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)


class EndableApp:
    """An ASGI application whose requests end some time after the service began to stop.

    Serve lets a gateway's requests go on for as long as those of a removed gateway may take.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._requests: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()
        if scope["type"] != "http" or task is None:
            await self._app(scope, receive, send)
            return
        self._requests.add(task)
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests.discard(task)

    async def end_after(self, end_of_service: EndOfService, drain_s: float) -> None:
        """Wait until the service stops, and cancel the requests left `drain_s` seconds later."""
        await end_of_service.wait()
        await asyncio.sleep(drain_s)
        for task in self._requests:
            task.cancel()
