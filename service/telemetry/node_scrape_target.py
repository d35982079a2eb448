"""One scrape target per node, with the metrics of all coe processes on the node.

Each gateway and pool serves its metrics on a Unix socket in a shared folder. A process collects the
node's metrics by reading every socket there. If a port is configured, the process that binds it
first serves the metrics of all; when that process ends, another one binds the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from aiohttp import web

from service.telemetry.prometheus_exposition import CONTENT_TYPE, join

log = logging.getLogger("coe.telemetry")

_RETRY_S = 1.0
_ANSWER_S = 5.0
# A younger socket may belong to a process that is still starting.
_MIN_STALE_AGE_S = 10.0
_MAX_SOCKET_PATH_BYTES = 107

Text = Callable[[], Awaitable[str]]


class NodeTarget:
    """This process's metrics endpoint on its node.

    Args:
        folder: Holds the sockets of all processes on the node.
        name: Unique on the node, such as gateway-ID or pool-KIND-BOOT.
        text: Renders this process's metrics.
        host: Address for `port`.
        port: Serves the metrics of the whole node; None: no port.
    """

    def __init__(self, folder: Path, name: str, text: Text, *, host: str, port: int | None) -> None:
        self._path = folder / f"{name}.sock"
        self._text = text
        self._host = host
        self._port = port
        self._runners: list[web.AppRunner] = []
        self._claiming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve this process's metrics. If the socket can't be made, log it and go on without."""
        try:
            own_folder(self._path.parent)
            if len(os.fsencode(self._path)) > _MAX_SOCKET_PATH_BYTES:
                raise OSError(errno.ENAMETOOLONG, "the path is too long for a socket")
            runner = await self._runner(self._text)
            await web.UnixSite(runner, str(self._path)).start()
        except OSError as error:
            log.error("cannot register on the node metrics socket: %s", error.strerror)
        if self._port is not None:
            self._claiming = asyncio.create_task(self._claim(self._port))

    async def stop(self) -> None:
        """Close the socket and the port."""
        if self._claiming is not None:
            self._claiming.cancel()
            await asyncio.gather(self._claiming, return_exceptions=True)
        for runner in self._runners:
            await runner.cleanup()
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()  # fails while other sockets remain

    async def others(self, kind: str = "") -> list[str]:
        """Return the metrics of the node's other processes whose names begin with `kind`."""
        found = sorted(self._path.parent.glob(f"{kind}*.sock"))
        texts = await asyncio.gather(*(_ask(path) for path in found if path != self._path))
        return [text for text in texts if text is not None]

    async def whole(self) -> str:
        """Return the metrics of all coe processes on this node."""
        own, others = await asyncio.gather(self._text(), self.others())
        return await asyncio.to_thread(join, [own, *others])

    async def _runner(self, text: Text) -> web.AppRunner:
        async def answer(_request: web.Request) -> web.Response:
            return web.Response(
                body=(await text()).encode(), headers={"content-type": CONTENT_TYPE}
            )

        application = web.Application()
        application.router.add_get("/metrics", answer)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _claim(self, port: int) -> None:
        runner = await self._runner(self.whole)
        logged: int | None = None
        while True:
            site = web.TCPSite(runner, self._host, port)
            try:
                await site.start()
            except OSError as error:
                # Otherwise the runner would collect one failed site per second.
                await site.stop()
                if error.errno not in (errno.EADDRINUSE, logged):
                    logged = error.errno
                    log.error("cannot bind metrics port %d: %s", port, error.strerror)
                await asyncio.sleep(_RETRY_S)
            else:
                return


async def _ask(path: Path) -> str | None:
    """Return one process's metrics, or None if the process does not answer."""
    try:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(path)),
                timeout=aiohttp.ClientTimeout(total=_ANSWER_S),
            ) as session,
            session.get("http://node/metrics") as reply,
        ):
            return await reply.text() if reply.status == 200 else None
    except aiohttp.ClientConnectorError:
        _remove_dead(path)
        return None
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


def _remove_dead(path: Path) -> None:
    """Remove the socket of a killed process, unless it is so young that it may be starting."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _MIN_STALE_AGE_S:
            path.unlink()


def own_folder(folder: Path) -> None:
    """Make a folder that only this user can access.

    Raises:
        OSError: The folder can't be made.
        PermissionError: It belongs to another user, or others can access it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"{folder} belongs to or is open to other users")
