"""The ASGI application behind a pool's port.

It accepts only requests that carry the cluster's secret. A `PoolHandler` answers them, so that this
module does not depend on pools.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any, Protocol

import orjson

from service.errors import CoeError, InvalidRequestError, UnauthorizedError, UnknownEndpointError
from service.http.asgi import (
    ClientDisconnectedError,
    Message,
    Receive,
    Send,
    body_message,
    read_body,
    send_response,
    start_response,
    until_gone,
)
from service.http.openai_errors import error_response, sse_event
from service.rpc import auth as secrets
from service.rpc.call_headers import Call, parse_call

log = logging.getLogger("coe.link")


class PoolHandler(Protocol):
    """The operations of a pool for its gateways."""

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        """Answer a call.

        Raises:
            CoeError: The call failed, before or after the first byte.
        """

    async def used(self, request_id: str) -> tuple[int, int] | None:
        """Prompt and answer tokens of a cancelled call; None if they are unknown."""

    def snapshots(self) -> AsyncIterator[bytes]:
        """Lines of the snapshot stream."""

    async def metrics(self) -> str:
        """Prometheus text."""

    def experts(self) -> dict[str, Any]:
        """Details of each expert's residency, as JSON."""

    async def moe_statistics(self, expert: str) -> dict[str, Any]:
        """Return the statistics of the gates of a mixture of experts.

        Raises:
            CoeError: There are no statistics.
        """

    def demand(self, wanted: dict[str, float]) -> None:
        """Record a gateway's unmet demand, by expert."""

    async def operate(self, act: str, expert: str) -> None:
        """Load, evict, pin or unpin an expert.

        Args:
            act: `load`, `evict`, `pin` or `unpin`.
            expert: The expert.

        Raises:
            CoeError: The operation is not possible.
        """


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
                raise UnauthorizedError("a pool's port takes only its own cluster's requests")
            path: str = scope["path"]
            if path == "/snapshots":
                await self._stream_snapshots(receive, reply)
            elif path == "/metrics":
                text = await self._handler.metrics()
                await reply.whole(200, b"text/plain; version=0.0.4", text.encode())
            elif path == "/experts":
                body = orjson.dumps(self._handler.experts())
                await reply.whole(200, b"application/json", body)
            elif path.startswith("/used/"):
                told = await self._handler.used(path.removeprefix("/used/"))
                await reply.whole(200, b"application/json", orjson.dumps(told))
            elif path.startswith("/moe-statistics/"):
                expert = path.removeprefix("/moe-statistics/")
                body = orjson.dumps(await self._handler.moe_statistics(expert))
                await reply.whole(200, b"application/json", body)
            elif scope["method"] == "POST" and path == "/demand":
                self._handler.demand(_amounts(await read_body(receive, self._max_body_bytes)))
                await reply.whole(200, b"application/json", b"{}")
            elif scope["method"] == "POST" and path.startswith("/operate/"):
                act, _, expert = path.removeprefix("/operate/").partition("/")
                await self._handler.operate(act, expert)
                await reply.whole(200, b"application/json", b"{}")
            elif scope["method"] == "POST":
                call = parse_call(path, headers)
                body = await read_body(receive, self._max_body_bytes)
                await until_gone(self._handler.run(call, body, reply), receive)
            else:
                raise UnknownEndpointError(f"a pool has no {path}")
        except ClientDisconnectedError:
            return
        except CoeError as error:
            await reply.fail(error)
        except Exception:
            # The HTTP server would log the error's text, which may quote a prompt.
            log.exception("a call failed unexpectedly")
            await reply.fail(CoeError("something went wrong in a pool; its log has kind and place"))

    async def _stream_snapshots(self, receive: Receive, reply: _Reply) -> None:
        async def stream() -> None:
            await reply(start_response(200, [(b"content-type", b"application/x-ndjson")]))
            async for line in self._handler.snapshots():
                await reply(body_message(line, more=True))
            await reply(body_message())

        await until_gone(stream(), receive)


class _Reply:
    """An ASGI send that knows whether the response has been started."""

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
        await send_response(self, status, headers, body)

    async def fail(self, error: CoeError) -> None:
        if self._ended:
            return
        if self._started:
            await self(body_message(sse_event(error)))
            return
        fault = error_response(error)
        await send_response(self, fault.status, fault.headers, fault.body)


def _amounts(body: bytes) -> dict[str, float]:
    try:
        return {str(name): float(amount) for name, amount in orjson.loads(body).items()}
    except (orjson.JSONDecodeError, AttributeError, TypeError, ValueError):
        raise InvalidRequestError("demand is an object of numbers by expert") from None
