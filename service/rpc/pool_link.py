"""The gateway's client of a pool, for calls and the snapshot stream over keep-alive HTTP."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from service.config.effective_config import AddedExperts
from service.errors import PoolUnavailableError, PoolUnreachableError
from service.rpc import cluster_secret as secrets
from service.rpc.call_headers import Call
from service.rpc.http_connections import (
    ConnectError,
    HttpConnection,
    HttpConnections,
    HttpReply,
    LineReader,
)
from service.rpc.snapshot import GONE_S, Snapshot, SnapshotDelta, decode

log = logging.getLogger("coe.link")

_RECONNECT_S = 0.25
_CONNECT_TIMEOUT_S = 2.0
# After so much silence, calls end even though the pool's machine takes connections.
_SILENT_S = 15.0
# After so many failed connects in a row, calls end at once. The kernel of a machine that is up
# answers a connect, or refuses it, however busy the pool's process is.
_DEAD_CONNECTS = 2
# A whole state has about 350 bytes for each expert.
_MOST_LINE_BYTES = 2**26
# An engine may take seconds to stop a request.
_USED_TIMEOUT_S = 8.0


SnapshotListener = Callable[[str, Snapshot, SnapshotDelta | None], None]
"""Takes a pool's boot id, its snapshot, and what that changes; None where it may be everything."""


@dataclass(frozen=True, slots=True)
class PoolAddress:
    """The address of a pool's process.

    Attributes:
        url: The URL of its port.
        kind: The kind of the pool.
        boot: The id of the process, new for every process.
    """

    url: str
    kind: str
    boot: str

    @property
    def name(self) -> str:
        """The pool's name in metrics and messages."""
        return f"{self.kind}-{self.boot}"


def new_session() -> aiohttp.ClientSession:
    """Create the HTTP session that all links of a gateway share for everything but calls."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        trust_env=False,
        read_bufsize=2**18,
    )


class PoolLink:
    """A gateway's link to one pool. Times are `time.monotonic` seconds.

    Args:
        address: The pool's address.
        session: The session of all links.
        secret: The cluster's secret.
        gateway: This gateway's id.
        changed: Called when the snapshot has changed.
        contexts_changed: Called before `changed` when experts or their contexts have changed, or
            when the stream of snapshots has ended.
        received: Called with each snapshot, before `changed`.
    """

    def __init__(
        self,
        address: PoolAddress,
        session: aiohttp.ClientSession,
        secret: str,
        gateway: str,
        changed: Callable[[], None],
        contexts_changed: Callable[[], None] | None = None,
        received: SnapshotListener | None = None,
    ) -> None:
        self.address = address
        self._contexts_changed = contexts_changed or changed
        self._received = received
        self.snapshot: Snapshot | None = None
        self.received_s = 0.0
        self.draining = False  # of the last snapshot, also after the pool has gone
        self._session = session
        self._headers = {secrets.HEADER: secret}
        self._gateway = gateway
        self._changed = changed
        self._seq = 0
        # Open calls that no snapshot has acknowledged, by number, in the order of sending.
        self._unseen: dict[int, str] = {}
        url = urlsplit(address.url)
        place = url.hostname or "", url.port or 80, _CONNECT_TIMEOUT_S
        self._connections = HttpConnections(*place)
        # Apart, because the calls of a silent pool are ended while its stream is tried again.
        self._snapshot_connections = HttpConnections(*place)
        self._calls = 0
        self._unused = asyncio.Event()
        self._unused.set()
        self._silent_since_s = time.monotonic()
        self._task = asyncio.create_task(self._follow())

    def age_s(self, now_s: float) -> float:
        """Seconds since the last snapshot."""
        return now_s - self.received_s if self.snapshot is not None else GONE_S + 1

    def silent_s(self, now_s: float) -> float:
        """Seconds since the last snapshot, or since the link's creation before the first."""
        return now_s - (self.received_s if self.snapshot is not None else self._silent_since_s)

    def unseen(self) -> dict[str, int]:
        """Number of sent requests that the snapshot does not count yet, by expert."""
        return Counter(self._unseen.values()) if self._unseen else {}

    def next_seq(self, expert: str) -> int:
        """Assign a number to a call that is about to be sent."""
        self._seq += 1
        self._unseen[self._seq] = expert
        return self._seq

    @asynccontextmanager
    async def call(self, call: Call, body: bytes) -> AsyncIterator[HttpReply]:
        """Send a call. Leaving the context early cancels the call in the pool.

        Raises:
            PoolUnreachableError: The connection could not be made.
            PoolUnavailableError: The connection was lost before the response's headers.
        """
        headers = {**self._headers, **call.headers(), "content-type": "application/json"}
        head = self._connections.head(call.endpoint, headers)
        self._calls += 1
        self._unused.clear()
        connection: HttpConnection | None = None
        try:
            try:
                connection = await self._connections.take()
                reply = await connection.request(head, body)
            except ConnectError as error:
                kind = self.address.kind
                raise PoolUnreachableError(
                    f"a pool of kind {kind!r} can't be reached ({error})"
                ) from None
            except ConnectionError as error:
                kind = self.address.kind
                raise PoolUnavailableError(
                    f"the connection to a pool of kind {kind!r} was lost ({type(error).__name__})"
                ) from None
            yield reply
        finally:
            # A call that has ended is in no queue, even if it never reached the pool.
            self._unseen.pop(call.seq, None)
            self._calls -= 1
            if not self._calls:
                self._unused.set()
            if connection is not None:
                self._connections.give_back(connection)

    async def metrics(self) -> str:
        """Fetch the pool's Prometheus text.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        return (await self._get("/metrics")).decode()

    async def experts(self) -> dict[str, Any]:
        """Fetch details of the pool's experts.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        details: dict[str, Any] = orjson.loads(await self._get("/experts"))
        return details

    async def gpus(self) -> list[dict[str, Any]]:
        """Fetch the memory of the pool's GPUs: total, used, free and reserved bytes.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        found: list[dict[str, Any]] = orjson.loads(await self._get("/gpus"))
        return found

    async def model_server_load(self) -> dict[str, Any]:
        """Fetch the load by which an endpoint picker of Kubernetes chooses.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        found: dict[str, Any] = orjson.loads(await self._get("/model-server-load"))
        return found

    async def operate(self, act: str, expert: str) -> tuple[int, bytes]:
        """Load, evict, unload, pin or unpin an expert.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        return await self._request(
            "POST", f"/operate/{quote(act, safe='')}/{quote(expert, safe='')}", timeout_s=120
        )

    async def release(self, keep: str) -> tuple[int, bytes]:
        """Let the pool give its accelerator back, as far as no request needs it.

        Args:
            keep: Where weights stay: `host`, `disk`, or empty for the config's.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        return await self._request("POST", f"/release/{quote(keep, safe='')}", timeout_s=120)

    async def moe_statistics(self, expert: str) -> tuple[int, bytes]:
        """Fetch the statistics of the gates of a mixture of experts.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        return await self._request("GET", f"/moe-statistics/{quote(expert, safe='')}", timeout_s=10)

    async def server_log(self, expert: str) -> tuple[int, bytes]:
        """Fetch the last lines of the server that a command started for an expert.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        return await self._request("GET", f"/server-log/{quote(expert, safe='')}", timeout_s=10)

    async def check_added(self, added: AddedExperts, name: str) -> tuple[int, bytes]:
        """Ask whether the pool can take an added expert in without touching another one.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        path = f"/added-experts-check/{quote(name, safe='')}"
        body = orjson.dumps(added.to_json())
        return await self._request("POST", path, timeout_s=60, body=body)

    async def set_added(self, added: AddedExperts) -> tuple[int, bytes]:
        """Let the pool serve these added experts and no others.

        Returns:
            The pool's status and body.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        body = orjson.dumps(added.to_json())
        return await self._request("POST", "/added-experts", timeout_s=120, body=body)

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Fetch prompt and answer tokens of a cancelled call; None if they are unknown."""
        try:
            status, body = await self._request(
                "GET", f"/used/{quote(request_id, safe='')}", timeout_s=_USED_TIMEOUT_S
            )
        except PoolUnavailableError:
            return None
        counts = orjson.loads(body) if status == 200 else None
        return (int(counts[0]), int(counts[1])) if counts is not None else None

    async def _get(self, path: str) -> bytes:
        status, body = await self._request("GET", path)
        if status != 200:
            raise PoolUnavailableError(f"the pool answered {path} with status {status}")
        return body

    async def demand(self, wanted: dict[str, float]) -> None:
        """Report unmet demand to the pool, by expert.

        Raises:
            PoolUnavailableError: The pool can't be reached.
        """
        await self._request("POST", "/demand", body=orjson.dumps(wanted))

    async def _request(
        self, method: str, path: str, *, timeout_s: float = 2, body: bytes | None = None
    ) -> tuple[int, bytes]:
        try:
            async with self._session.request(
                method,
                self.address.url + path,
                headers=self._headers,
                data=body,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as reply:
                return reply.status, await reply.read()
        except (aiohttp.ClientError, TimeoutError, OSError):
            raise PoolUnavailableError("the pool can't be reached") from None

    @property
    def follows(self) -> bool:
        """Whether the link still follows the pool."""
        return not self._task.done()

    async def unused(self) -> None:
        """Wait until no call is in flight.

        Until then the link must follow even a pool that gets no more calls, because nothing else
        notices when the pool falls silent.
        """
        await self._unused.wait()

    async def close(self) -> None:
        """Stop following the pool, and end its connections."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._connections.close()
        self._snapshot_connections.close()

    async def _follow(self) -> None:
        dead_connects = 0
        while True:
            connected = True
            try:
                await self._read_snapshots()
            except (OSError, ValueError) as error:  # TimeoutError is an OSError
                log.debug("snapshot stream of %s: %r", self.address.url, error)
                connected = not _is_unanswered_connect(error)
            except Exception:
                # A pool that nobody follows would be lost until its process ends.
                log.exception("a snapshot of %s could not be taken over", self.address.name)
            if self.snapshot is not None:
                self._silent_since_s = self.received_s
            self.snapshot = None
            self._contexts_changed()
            self._changed()
            dead_connects = 0 if connected else dead_connects + 1
            silent_s = time.monotonic() - self._silent_since_s
            if dead_connects >= _DEAD_CONNECTS or silent_s > _SILENT_S:
                # A pool that hangs does not close its connections, nor does one whose machine has
                # lost its power or its network, so calls would wait for ever.
                self._connections.abort_calls()
            await asyncio.sleep(_RECONNECT_S)

    async def _read_snapshots(self) -> None:
        snapshot: Snapshot | None = None

        def receive(line: bytes) -> None:
            nonlocal snapshot
            snapshot, delta = decode(line, snapshot)
            if snapshot.boot != self.address.boot:
                raise ValueError("another process has this address now")
            self.receive_snapshot(snapshot, delta)

        headers = {**self._headers, "x-coe-gateway": self._gateway}
        path = urlsplit(self.address.url).path
        head = self._snapshot_connections.head(path + "/snapshots", headers, "GET")
        lines = LineReader(receive, _MOST_LINE_BYTES)
        begun_s = time.monotonic()
        connection = await self._snapshot_connections.take()
        try:
            async with asyncio.timeout(GONE_S):
                reply = await connection.request(head, b"", lines)
            if reply.status != 200:
                raise ValueError(f"status {reply.status}")
            while not lines.ended.done():
                left_s = max(begun_s, self.received_s) + GONE_S - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError("the pool is silent")
                await asyncio.wait([lines.ended], timeout=left_s)
            lines.ended.result()
        finally:
            connection.abort()
            self._snapshot_connections.give_back(connection)
            if not lines.ended.cancel():
                lines.ended.exception()  # asyncio would log an error that nobody has looked at

    def receive_snapshot(self, snapshot: Snapshot, delta: SnapshotDelta | None = None) -> None:
        """Take over a snapshot, and what it changes where that is known."""
        before, self.snapshot = self.snapshot, snapshot
        self.draining = snapshot.draining
        self.received_s = time.monotonic()
        acknowledged = snapshot.acks.get(self._gateway, 0)
        for seq in list(takewhile(lambda seq: seq <= acknowledged, self._unseen)):
            del self._unseen[seq]
        if before is None or _contexts_differ(snapshot, before, delta):
            self._contexts_changed()
        if self._received is not None:
            self._received(self.address.boot, snapshot, delta)
        if before is None or before.seq != snapshot.seq:
            self._changed()


def _is_unanswered_connect(error: Exception) -> bool:
    """Return whether nothing at all answered a connect, as when a machine or its link is down."""
    cause = error.__cause__
    return isinstance(error, ConnectError) and (
        isinstance(cause, TimeoutError)
        or getattr(cause, "errno", None)
        in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT)
    )


def _contexts_differ(new: Snapshot, old: Snapshot, delta: SnapshotDelta | None) -> bool:
    if delta is None or delta.before is not old:
        return new.experts is not old.experts
    before = old.experts
    return "experts" in delta.removed or any(
        name not in before or before[name].max_model_len != new.experts[name].max_model_len
        for name in delta.changed.get("experts", ())
    )
