"""ASGI helpers: reading a body, building a reply's messages, and noticing that a client left."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

from service.errors import BodyTooLargeError, RequestTimeoutError

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


# Every stream has these headers, because proxies would buffer its events and may store the reply.
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]

WHEN_GONE = "coe.when_gone"
"""ASGI extension: a function that takes what to call, once, when the client has left; or None."""


class ClientDisconnectedError(Exception):
    """The client has left, so there is nobody to answer."""


def start_response(status: int, headers: Iterable[tuple[bytes, bytes]] = ()) -> Message:
    """The message that begins a reply."""
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body_message(body: bytes = b"", *, more: bool = False) -> Message:
    """A message with a piece of a reply's body; `more` says that another one follows."""
    message: Message = {"type": "http.response.body", "body": body}
    if more:
        message["more_body"] = True
    return message


async def send_response(
    send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> None:
    """Send a whole reply."""
    await send(start_response(status, headers))
    await send(body_message(body))


async def send_json(send: Send, status: int, body: bytes) -> None:
    """Send a whole reply whose body is JSON already."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send_response(send, status, headers, body)


class LineBuffer:
    """Splits a stream that comes in pieces into whole lines, and keeps the unfinished line."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, piece: bytes, *, ends: bool) -> bytes:
        """Return the lines that this piece completes.

        Args:
            piece: The next bytes of the stream.
            ends: Whether the stream ends here; then the unfinished line is returned as well.
        """
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
        """Forget the unfinished line."""
        self._rest.clear()


async def read_body(
    receive: Receive, max_bytes: int, *, declared: bytes = b"", timeout_s: float | None = None
) -> bytes:
    """Read the whole body.

    Args:
        receive: The request's ASGI `receive`.
        max_bytes: The greatest body that is accepted.
        declared: The content-length header. A body that declares too many bytes is refused
            before any of it is read.
        timeout_s: The time that the body may take; None for no bound.

    Raises:
        BodyTooLargeError: The body is larger than `max_bytes`.
        RequestTimeoutError: The body did not arrive within `timeout_s`.
        ClientDisconnectedError: The client left before its body was complete.
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
    # One buffer: a list of tiny pieces would take many times the memory of the body.
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


async def until_gone(
    work: Awaitable[None], receive: Receive, scope: Mapping[str, Any] | None = None
) -> None:
    """Run `work`. Cancel it and raise ClientDisconnectedError if the client disconnects first.

    Args:
        work: The work.
        receive: The request's ASGI `receive`; its whole body has been read.
        scope: The request's ASGI scope. Where its server has the extension `WHEN_GONE`, that is
            used instead of `receive`, which needs a task for each request.
    """
    running = asyncio.current_task()
    assert running is not None
    gone = False

    def leave() -> None:
        nonlocal gone
        gone = True
        running.cancel()

    async def watch() -> None:
        # A connection that can't be read has no client any more.
        with suppress(Exception):
            while (await receive())["type"] != "http.disconnect":
                pass
        leave()

    when_gone = None if scope is None else scope.get("extensions", {}).get(WHEN_GONE)
    end_watch: Callable[[], object]
    if when_gone is not None:
        when_gone(leave)
        end_watch = partial(when_gone, None)
    else:
        # Only the watch has a task of its own: one for the work would cost every request another
        # turn of the loop.
        end_watch = asyncio.create_task(watch()).cancel
    try:
        await work
    except asyncio.CancelledError:
        # More cancellations than ours mean that the request itself is to end.
        if gone and not running.uncancel():
            raise ClientDisconnectedError from None
        raise
    finally:
        end_watch()
    if gone:
        running.uncancel()
        raise ClientDisconnectedError
