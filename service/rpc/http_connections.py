"""Keep-alive HTTP/1.1 connections to one address, for calls that relay bytes.

Every token crosses them, so they do no more than that: no redirects, cookies, encodings, TLS or
proxies. `httptools` (llhttp) parses replies, and `asyncio.StreamReader` buffers bodies and stops
reading where the reader is slow. A call costs a quarter of the processor time of aiohttp's, see
`docs/benchmarks/hot-path.md`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import httptools

# Bytes of a body that may wait to be read. The stream reader stops reading at twice as many.
_BUFFER_BYTES = 2**18
# Less than the server keeps idle connections, so that a request rarely meets one that ends.
_IDLE_S = 60.0
# Replies below are interim, such as 103 Early Hints, and say nothing of the final one.
_LEAST_FINAL = 200
_HEAD_BYTES = 256 * 1024


class ConnectError(OSError):
    """No connection could be made."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A reply, once its headers have arrived.

    Attributes:
        status: The HTTP status.
        headers: The headers, by name in lower case.
        body: The body as a stream. Reading it raises a ConnectionError if the connection is lost.
    """

    status: int
    headers: dict[str, str]
    body: asyncio.StreamReader


class LineReader:
    """A body whose lines are passed on as they come, without a task that wakes for each of them.

    Args:
        receive: Called with each line, without its end. What it raises ends the reading.
        most_bytes: The most bytes of a line.

    Attributes:
        ended: Done when the body has ended; with what was raised or the connection's error, if any.
    """

    def __init__(self, receive: Callable[[bytes], None], most_bytes: int) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receive = receive
        self._most_bytes = most_bytes
        # A line whose end has not come yet.
        self._begun: list[bytes] = []
        self._begun_bytes = 0

    def feed_data(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        if self.ended.done():
            return
        first, *others = data.split(b"\n")
        try:
            self._begin(first)
            for line in others:
                whole = b"".join(self._begun)
                self._begun.clear()
                self._begun_bytes = 0
                self._receive(whole)
                self._begin(line)
        except Exception as error:
            self.ended.set_exception(error)

    def _begin(self, part: bytes) -> None:
        self._begun.append(part)
        self._begun_bytes += len(part)
        if self._begun_bytes > self._most_bytes:
            raise ValueError(f"a line has more than {self._most_bytes} bytes")

    def feed_eof(self) -> None:
        """End the body."""
        if not self.ended.done():
            self.ended.set_result(None)

    def set_exception(self, error: Exception) -> None:
        """End the body, because the connection was lost."""
        if not self.ended.done():
            self.ended.set_exception(error)


class HttpConnection(asyncio.Protocol):
    """A connection with at most one request at a time."""

    def __init__(self) -> None:
        self.idle_since_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._head: asyncio.Future[HttpReply] | None = None
        self._headers: dict[str, str] = {}
        # Bytes that came before the headers ended.
        self._head_bytes = 0
        self._body: asyncio.StreamReader | LineReader | None = None
        self._lines: LineReader | None = None
        self._until_close = False
        self._ended = True

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent: the last reply ended, and the server stays."""
        transport = self._transport
        if not self._ended or transport is None or transport.is_closing():
            return False
        # A long reply that nobody read has stopped it, and would stop the next reply, too.
        return transport.is_reading()

    async def request(self, head: bytes, body: bytes, lines: LineReader | None = None) -> HttpReply:
        """Send a request, and wait for the headers of its reply.

        Args:
            head: The request line and all headers but `content-length`.
            body: The body.
            lines: Gets the reply's body instead of the reply's own reader.

        Raises:
            ConnectionError: The connection was lost, or the reply is not HTTP.
        """
        assert self._transport is not None
        self._ended = False
        self._lines = lines
        self._parser = httptools.HttpResponseParser(self)
        self._head = asyncio.get_running_loop().create_future()
        self._head_bytes = 0
        # Requests of one turn of the loop are written after it, one behind the other. So only the
        # first one wakes the server's process, which costs as much as the write.
        data = b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)
        asyncio.get_running_loop().call_soon(self._transport.write, data)
        return await self._head

    def abort(self) -> None:
        """End the connection at once. The server then cancels the request."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self.abort()  # nobody asked for it
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"the reply is not HTTP: {error}"))
            self.abort()
            return
        if self._head is not None and not self._head.done():
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._fail(ConnectionError(f"its headers have more than {_HEAD_BYTES} bytes"))
                self.abort()

    def on_message_begin(self) -> None:
        self._headers = {}
        if self._ended:
            self.abort()  # a second reply to one request

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._transport is not None
        status = self._parser.get_status_code()
        if not 100 <= status <= 599:
            raise ValueError(f"status {status}")  # the parser passes it on as an error of its own
        if status < _LEAST_FINAL:
            return  # the reply follows
        body = asyncio.StreamReader(_BUFFER_BYTES)
        self._body = self._lines or body
        body.set_transport(self._transport)
        # Such a body, of an HTTP/1.0 server for example, ends where the connection does.
        chunked = "chunked" in self._headers.get("transfer-encoding", "")
        has_body = status not in (204, 304)
        self._until_close = has_body and not chunked and "content-length" not in self._headers
        if self._head is not None and not self._head.done():
            self._head.set_result(HttpReply(status, self._headers, body))

    def on_body(self, data: bytes) -> None:
        if self._body is not None:
            self._body.feed_data(data)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < _LEAST_FINAL:
            return
        self._ended = True
        if self._body is not None:
            self._body.feed_eof()
            self._body = None
        if not self._parser.should_keep_alive():
            self.abort()

    def eof_received(self) -> None:
        if self._until_close and self._body is not None:
            self._ended = True
            self._body.feed_eof()
            self._body = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionResetError("the connection was lost"))
        self._transport = None

    def _fail(self, error: ConnectionError) -> None:
        """End a request that has no whole reply."""
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)
        if self._body is not None:
            self._body.set_exception(error)
            self._body = None


class HttpConnections:
    """The connections to one address. A call takes an idle one, or makes another.

    Args:
        host: The host.
        port: The port.
        connect_timeout_s: The time that a new connection may take.
    """

    def __init__(self, host: str, port: int, connect_timeout_s: float) -> None:
        self._host, self._port = host, port
        self._connect_timeout_s = connect_timeout_s
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._host_line = f"host: {authority}"
        # The most recently used one comes last.
        self._idle: list[HttpConnection] = []
        self._busy: set[HttpConnection] = set()

    async def take(self) -> HttpConnection:
        """Take a connection; `give_back` has to follow.

        Raises:
            ConnectError: No connection can be made.
        """
        now_s = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and now_s - connection.idle_since_s < _IDLE_S:
                self._busy.add(connection)
                return connection
            connection.abort()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(HttpConnection, self._host, self._port)
        except OSError as error:  # TimeoutError is one
            raise ConnectError(type(error).__name__) from error
        self._busy.add(connection)
        return connection

    def give_back(self, connection: HttpConnection) -> None:
        """Give a connection back. One whose reply has not ended is closed."""
        if connection not in self._busy:
            connection.abort()
            return
        self._busy.discard(connection)
        if connection.reusable:
            connection.idle_since_s = time.monotonic()
            self._idle.append(connection)
        else:
            connection.abort()

    def head(self, path: str, headers: Mapping[str, str], method: str = "POST") -> bytes:
        """The request line and headers of a request.

        Raises:
            ValueError: A header would break out of its line.
        """
        lines = [f"{method} {path} HTTP/1.1", self._host_line]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        text = "\r\n".join(lines)
        if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1:
            raise ValueError("a header holds a line break")
        return f"{text}\r\n".encode()

    def abort_calls(self) -> None:
        """End the connections of all calls; their readers get a ConnectionError."""
        for connection in list(self._busy):
            connection.abort()

    def close(self) -> None:
        """End every connection."""
        self.abort_calls()
        self._busy.clear()
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
