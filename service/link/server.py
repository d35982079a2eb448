"""A pool's side of the link: the ASGI application behind its port.

It takes only requests that carry the cluster's secret. What it serves is told by
a `PoolHandler`, so that this module knows nothing of pools.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from service.errors import BodyTooLarge, CoeError, Unauthorized, UnknownEndpoint
from service.link import secret as secrets
from service.link.call import Call, parse_call
from service.link.faults import fault_of, sse_event

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class ClientGone(Exception):
    """The client left before its request was whole: there is nobody to answer."""


class PoolHandler(Protocol):
    """What a pool does for its gateways."""

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        """Answer a call; raises CoeError if it can't, before or after the first byte."""

    def snapshots(self) -> AsyncIterator[bytes]:
        """Lines of the snapshot stream."""

    def metrics(self) -> bytes:
        """Prometheus text."""


class PoolApp:
    """The application of one pool."""

    def __init__(self, handler: PoolHandler, secret: str, max_body_bytes: int) -> None:
        self._handler = handler
        self._secret = secret.encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        reply = _Reply(send)
        try:
            given = headers.get(secrets.HEADER.encode(), b"")
            if not secrets.same(given, self._secret):
                raise Unauthorized("a pool's port takes only its own cluster's requests")
            path: str = scope["path"]
            if path == "/snapshots":
                await self._stream_snapshots(receive, reply)
            elif path == "/metrics":
                await reply.whole(200, b"text/plain; version=0.0.4", self._handler.metrics())
            elif scope["method"] == "POST":
                call = parse_call(path, headers)
                body = await read_body(receive, self._max_body_bytes)
                await until_gone(self._handler.run(call, body, reply), receive)
            else:
                raise UnknownEndpoint(f"a pool has no {path}")
        except ClientGone:
            return
        except CoeError as error:
            await reply.fail(error)

    async def _stream_snapshots(self, receive: Receive, reply: _Reply) -> None:
        async def stream() -> None:
            await reply(_start(200, [(b"content-type", b"application/x-ndjson")]))
            async for line in self._handler.snapshots():
                await reply({"type": "http.response.body", "body": line, "more_body": True})
            await reply({"type": "http.response.body", "body": b""})

        await until_gone(stream(), receive)


class _Reply:
    """An ASGI send that knows whether the head has gone out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._started = True
        elif not message.get("more_body", False):
            self._ended = True
        await self._send(message)

    async def whole(self, status: int, content_type: bytes, body: bytes) -> None:
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await self(_start(status, headers))
        await self({"type": "http.response.body", "body": body})

    async def fail(self, error: CoeError) -> None:
        if self._ended:
            return
        if self._started:
            await self({"type": "http.response.body", "body": sse_event(error)})
            return
        fault = fault_of(error)
        await self(_start(fault.status, fault.headers))
        await self({"type": "http.response.body", "body": fault.body})


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def read_body(receive: Receive, max_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge, and ClientGone if the client left."""
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()
    raise ClientGone


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than the {max_bytes} bytes allowed")


async def until_gone(work: Awaitable[None], receive: Receive) -> None:
    """Do `work`, and cancel it if the client leaves first."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
