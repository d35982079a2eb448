"""The load generator: closed loops over keep-alive connections.

It shares the machine with the measured service, so it has to be cheap. A request needs no task and
no future: the callback that reads the end of a reply writes the next request.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import orjson

_CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """The target of requests: address, endpoint path, a key if needed, and headers of its own."""

    host: str
    port: int
    path: str = "/v1/chat/completions"
    key: str = ""
    headers: tuple[tuple[str, str], ...] = ()

    def request(self, body: dict[str, Any]) -> bytes:
        """A whole HTTP request, ready to be written."""
        data = orjson.dumps(body)
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        own = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n{key}{own}"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data


@dataclass(slots=True)
class Exchange:
    """A request and its reply; times of `time.perf_counter` in s.

    `parts_at_s`: when each of `parts` was read.
    """

    began_s: float
    first_s: float = 0.0
    ended_s: float = 0.0
    status: int = 0
    error: str = ""
    parts: list[bytes] = field(default_factory=list)
    parts_at_s: list[float] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        """The reply's body."""
        return b"".join(self.parts)

    @property
    def total_ms(self) -> float:
        """From the request's writing to the reply's end."""
        return (self.ended_s - self.began_s) * 1000

    @property
    def first_ms(self) -> float:
        """From the request's writing to the first byte of the reply's body."""
        return (self.first_s - self.began_s) * 1000

    def fault(self) -> str | None:
        """Return the fault of a reply that should be a complete stream, or None."""
        if self.error:
            return self.error
        body = self.body
        if self.status != 200:
            return f"status {self.status}: {body[:200].decode('utf-8', 'replace')}"
        if not body.rstrip().endswith(b"data: [DONE]"):
            return f"the stream has no end: {body[-200:].decode('utf-8', 'replace')}"
        if b'data: {"error"' in body:
            return f"an error in the stream: {body[-300:].decode('utf-8', 'replace')}"
        return None


@dataclass(frozen=True, slots=True)
class Turn:
    """The results of a closed loop. `cpu_s`: the generator's own processor time."""

    exchanges: list[Exchange]
    wall_s: float
    cpu_s: float

    @property
    def rate(self) -> float:
        """Replies per second."""
        return len(self.exchanges) / self.wall_s

    def check(self) -> Turn:
        """Itself. Raises RuntimeError if any reply was not whole."""
        faults = [fault for exchange in self.exchanges if (fault := exchange.fault()) is not None]
        if faults:
            raise RuntimeError(f"{len(faults)} of {len(self.exchanges)} failed: {faults[0]}")
        return self


Supply = Callable[[], bytes | None]


class _Connection(asyncio.Protocol):
    """A keep-alive connection with at most one request in flight."""

    def __init__(self, ended: Callable[[_Connection, Exchange], None]) -> None:
        self._ended = ended
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._exchange: Exchange | None = None
        self._now_s = 0.0

    @property
    def open(self) -> bool:
        """Whether another request may be written."""
        return self._transport is not None and not self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def ask(self, request: bytes) -> None:
        """Write a request."""
        assert self._transport is not None
        self._exchange = Exchange(time.perf_counter())
        self._transport.write(request)

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP: {error!r}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._now_s = time.perf_counter()
        self._transport = None
        self._end(f"the connection was closed in mid-reply ({exc!r})")

    def on_headers_complete(self) -> None:
        """The parser: the head is whole."""
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """The parser: a piece of the body."""
        exchange = self._exchange
        if exchange is not None:
            if not exchange.first_s:
                exchange.first_s = self._now_s
            exchange.parts.append(body)
            exchange.parts_at_s.append(self._now_s)

    def on_message_complete(self) -> None:
        """The parser: the reply is whole."""
        if not self._parser.should_keep_alive():
            self.close()
        self._end("")

    def _end(self, error: str) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.ended_s = self._now_s
            exchange.error = error
            self._ended(self, exchange)


class _Loop:
    """The state of one closed loop."""

    def __init__(self, target: Target, supply: Supply, until_s: float | None) -> None:
        self._target = target
        self._supply = supply
        self._until_s = until_s
        self._busy = 0
        self._done = asyncio.get_running_loop().create_future()
        self._reconnecting: set[asyncio.Task[None]] = set()
        self.connections: list[_Connection] = []
        self.exchanges: list[Exchange] = []

    async def connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        making = loop.create_connection(
            lambda: _Connection(self._ended), self._target.host, self._target.port
        )
        _, connection = await asyncio.wait_for(making, _CONNECT_TIMEOUT_S)
        self.connections.append(connection)
        return connection

    async def run(self, for_s: float | None, spread_s: float) -> None:
        if for_s is not None:
            self._until_s = time.perf_counter() + for_s
        # All are counted first: the loop must not end before the last one has begun.
        self._busy = len(self.connections)
        if not spread_s:
            for connection in list(self.connections):
                self._begin(connection)
        else:
            clock = asyncio.get_running_loop()
            for i, connection in enumerate(self.connections):
                clock.call_later(i * spread_s / len(self.connections), self._begin, connection)
        await self._done

    def _begin(self, connection: _Connection) -> None:
        if connection.open:
            self._next(connection)
        else:
            self._replace_connection()

    def _next(self, connection: _Connection) -> None:
        late = self._until_s is not None and time.perf_counter() >= self._until_s
        request = None if late else self._supply()
        if request is not None:
            connection.ask(request)
            return
        self._busy -= 1
        if self._busy == 0 and not self._done.done():
            self._done.set_result(None)

    def _ended(self, connection: _Connection, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        if connection.open:
            self._next(connection)
            return
        # A server that closes after its reply costs us a connection, not the run.
        self._replace_connection()

    def _replace_connection(self) -> None:
        task = asyncio.ensure_future(self._reconnect())
        self._reconnecting.add(task)
        task.add_done_callback(self._reconnecting.discard)

    async def _reconnect(self) -> None:
        try:
            connection = await self.connect()
        except OSError as error:
            if not self._done.done():
                self._done.set_exception(error)
            return
        self._next(connection)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def closed_loop(
    target: Target,
    supply: Supply,
    in_flight: int,
    *,
    for_s: float | None = None,
    spread_s: float = 0.0,
) -> Turn:
    """Keep `in_flight` requests under way until `supply` gives None, or for `for_s`.

    Connections are open before the clock starts. The first requests begin at once, or at even
    times over `spread_s`.
    """
    loop = _Loop(target, supply, None)
    try:
        for _ in range(in_flight):
            await loop.connect()
        with _no_collection():
            cpu_s, began_s = time.process_time(), time.perf_counter()
            await loop.run(for_s, spread_s)
            wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    finally:
        for connection in loop.connections:
            connection.close()
    return Turn(loop.exchanges, wall_s, cpu_s)


class Asker:
    """A keep-alive connection for consecutive requests."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._connection: _Connection | None = None
        self._waiter: asyncio.Future[Exchange] | None = None

    async def ask(self, request: bytes) -> Exchange:
        """Send a request and wait for its reply. Raises RuntimeError if it was not whole."""
        loop = asyncio.get_running_loop()
        if self._connection is None or not self._connection.open:
            self._connection = await self._connect()
        self._waiter = loop.create_future()
        self._connection.ask(request)
        exchange = await self._waiter
        if (fault := exchange.fault()) is not None:
            raise RuntimeError(fault)
        return exchange

    async def _connect(self) -> _Connection:
        making = asyncio.get_running_loop().create_connection(
            lambda: _Connection(self._ended), self.target.host, self.target.port
        )
        _, connection = await asyncio.wait_for(making, _CONNECT_TIMEOUT_S)
        return connection

    def _ended(self, connection: _Connection, exchange: Exchange) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(exchange)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()


def repeat(request: bytes) -> Supply:
    """Return a supply that repeats one request."""
    return lambda: request


def once(requests: list[bytes]) -> Supply:
    """Each request once, in order."""
    left = iter(requests)
    return lambda: next(left, None)


def completion_tokens(body: bytes) -> int:
    """Return a stream's completion tokens. Raises ValueError if it has no usage."""
    for line in reversed(body.splitlines()):
        if line.startswith(b"data: {") and b'"usage"' in line:
            usage = orjson.loads(line[6:]).get("usage")
            if usage:
                return int(usage["completion_tokens"])
    raise ValueError("the stream tells no usage")
