"""One scrape target per node: the metrics of all our processes on it.

Every gateway and pool answers on a Unix socket of its own in one folder. Whoever wants the
node's metrics asks every socket there. Where a port is configured, whichever process
binds it first answers on it for all; when that one ends, another takes its place.
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

from service.telemetry.exposition import CONTENT_TYPE, join

log = logging.getLogger("coe.telemetry")

_RETRY_S = 1.0
_ANSWER_S = 5.0
_YOUNG_S = 10.0
# Bytes that a Unix socket's address may have.
_MOST_PATH = 107

Text = Callable[[], Awaitable[str]]


class NodeTarget:
    """This process's place on its node.

    `name`: unique on the node, such as gateway-ID or pool-KIND-BOOT. `text`: this process's
    metrics. `port`: where the node's are served to others, None: nowhere.
    """

    def __init__(self, folder: Path, name: str, text: Text, *, host: str, port: int | None) -> None:
        self._path = folder / f"{name}.sock"
        self._text = text
        self._host = host
        self._port = port
        self._runners: list[web.AppRunner] = []
        self._claiming: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer. Without a place for the socket the process goes on, and says so in its log."""
        try:
            own_folder(self._path.parent)
            if len(os.fsencode(self._path)) > _MOST_PATH:
                raise OSError(errno.ENAMETOOLONG, "the path is too long for a socket")
            runner = await self._runner(self._text)
            await web.UnixSite(runner, str(self._path)).start()
        except OSError as error:
            log.error("metrics of this process stay out of its node's: %s", error.strerror)
        if self._port is not None:
            self._claiming = asyncio.create_task(self._claim(self._port))

    async def stop(self) -> None:
        """Answer no more."""
        if self._claiming is not None:
            self._claiming.cancel()
            await asyncio.gather(self._claiming, return_exceptions=True)
        for runner in self._runners:
            await runner.cleanup()
        self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()  # only the last one can

    async def others(self, kind: str = "") -> list[str]:
        """The metrics of the node's other processes whose names begin with `kind`."""
        found = sorted(self._path.parent.glob(f"{kind}*.sock"))
        texts = await asyncio.gather(*(_ask(path) for path in found if path != self._path))
        return [text for text in texts if text is not None]

    async def whole(self) -> str:
        """The metrics of all our processes on this node."""
        own, others = await asyncio.gather(self._text(), self.others())
        return await asyncio.to_thread(join, [own, *others])

    async def _runner(self, text: Text) -> web.AppRunner:
        async def answer(request: web.Request) -> web.Response:
            del request
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
        told: int | None = None
        while True:
            site = web.TCPSite(runner, self._host, port)
            try:
                await site.start()
            except OSError as error:
                # The runner keeps a site that could not start, too: one a second, for ever.
                await site.stop()
                if error.errno not in (errno.EADDRINUSE, told):
                    told = error.errno
                    log.error("metrics port %d: %s", port, error.strerror)
                await asyncio.sleep(_RETRY_S)
            else:
                return


async def _ask(path: Path) -> str | None:
    """One process's metrics; None where it has gone."""
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
    """Its process was killed: nobody will use this socket again. A young one may be starting."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _YOUNG_S:
            path.unlink()


def own_folder(folder: Path) -> None:
    """Make it, for us alone. Raises OSError where it is somebody else's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    told = folder.lstat()
    if told.st_uid != os.getuid() or told.st_mode & 0o077:
        raise PermissionError(errno.EPERM, f"{folder} is not ours alone")
