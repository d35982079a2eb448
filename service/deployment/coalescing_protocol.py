"""A uvicorn protocol that writes what one turn of the event loop sends with one system call.

uvicorn writes a reply's headers, each piece of its body and its end one by one. Where they are sent
without waiting in between, as for short answers and for the end of every stream, they would cost a
system call each, and as many on the side that reads. A write to another process on the same machine
takes about 14 µs, which is more than most steps of a request, see `docs/benchmarks/hot-path.md`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.asgi_helpers import WHEN_GONE

# More bytes than that are written at once, so that a sender that never waits still learns from the
# transport that its client does not read.
_MOST_BYTES = 2**16


class CoalescingTransport:
    """A transport that joins the writes of one turn of the event loop.

    Args:
        transport: Takes the joined writes, and everything else at once.
        loop: The event loop.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write at the end of this turn, or when much is waiting."""
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MOST_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what waits, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if waiting and not self._transport.is_closing():
            self._transport.write(waiting[0] if len(waiting) == 1 else b"".join(waiting))


class CoalescingProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol over a coalescing transport, with the extension `WHEN_GONE`."""

    # What to call once the client has left, and the scope of the request that asked for it.
    _leave: tuple[Any, Callable[[], None]] | None = None

    def connection_made(  # type: ignore[override]  # as in uvicorn
        self, transport: asyncio.Transport
    ) -> None:
        joined = CoalescingTransport(transport, self.loop)
        super().connection_made(cast(asyncio.Transport, joined))

    def on_headers_complete(self) -> None:
        """Begin to answer a request."""
        scope = cast(dict[str, Any], self.scope)
        scope["extensions"] = {WHEN_GONE: partial(self._when_gone, scope)}
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who answers the client that it has left."""
        super().connection_lost(exc)
        leave, self._leave = self._leave, None
        if leave is not None and not self.cycle.response_complete:
            leave[1]()

    def _when_gone(self, scope: Any, leave: Callable[[], None] | None) -> None:
        if leave is None:
            # The next request of the connection may have begun.
            if self._leave is not None and self._leave[0] is scope:
                self._leave = None
        elif self.cycle.disconnected:
            self.loop.call_soon(leave)
        else:
            self._leave = scope, leave
