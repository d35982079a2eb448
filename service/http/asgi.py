"""What both ends of an HTTP request need: its body, and knowing when the client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from service.errors import BodyTooLargeError, RequestTimeoutError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


# On every stream: proxies would keep its events back, and may store the reply.
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class ClientDisconnectedError(Exception):
    """The client has left: there is nobody to answer."""


class LineBuffer:
    """Gives out whole lines of a stream that comes in pieces, and keeps what is left of one."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, piece: bytes, *, ends: bool) -> bytes:
        """The lines that are whole with this piece. `ends`: no other comes, so all that is left."""
        end = len(piece) if ends else piece.rfind(b"\n") + 1
        if not end and not ends:
            self._rest += piece
            return b""
        if not self._rest and end == len(piece):
            return piece
        lines = bytes(self._rest) + piece[:end]
        self._rest = bytearray(piece[end:])
        return lines

    def drop(self) -> None:
        """Forget what is left of a line."""
        self._rest.clear()


async def read_body(
    receive: Receive, max_bytes: int, *, declared: bytes = b"", timeout_s: float | None = None
) -> bytes:
    """The whole body.

    `declared`: the content-length header, so that nothing of a body that says that it
    is too large is waited for. Raises BodyTooLargeError, RequestTimeoutError where it did not
    come within `timeout_s`, and ClientDisconnectedError if the client left.
    """
    if declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_large(max_bytes)
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await _whole(receive, max_bytes)
    except TimeoutError:
        if not limit.expired():
            raise
        raise RequestTimeoutError(f"the body did not arrive within {timeout_s:g} s") from None


async def _whole(receive: Receive, max_bytes: int) -> bytes:
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
        return body
    # One buffer: a list of its pieces would cost many times the body when they are tiny.
    whole = bytearray()
    while message["type"] == "http.request":
        whole += message.get("body", b"")
        if len(whole) > max_bytes:
            raise _too_large(max_bytes)
        if not message.get("more_body", False):
            return bytes(whole)
        message = await receive()
    raise ClientDisconnectedError


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than the {max_bytes} bytes allowed")


async def until_gone(work: Awaitable[None], receive: Receive) -> None:
    """Do `work`. If the client leaves first, cancel it and raise ClientDisconnectedError."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return
        raise ClientDisconnectedError
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
