"""The console's endpoints, as plain ASGI."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from service.errors import CoeError
from service.gateway.console.assets import Asset, load_assets
from service.gateway.console.event_stream import EventStream
from service.http.asgi_helpers import (
    ClientDisconnectedError,
    Receive,
    Send,
    body_message,
    send_response,
    start_response,
    until_gone,
)
from service.http.error_formats import error_response

_STREAM = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


def console_routes(
    feed: EventStream, may_watch: Callable[[dict[bytes, bytes]], None], *, behind_serve: bool
) -> list[Route]:
    """Return the routes of `/`, `/console`, `/docs`, their files, and the stream of events.

    Args:
        feed: The stream of events.
        may_watch: Raises CoeError if a request's headers do not allow it to see the events.
        behind_serve: Whether Ray Serve's HTTP server is around the application. It cancels a
            request whose client has left.
    """

    async def home(request: Request) -> Response:
        del request
        return RedirectResponse("/console", 307)

    routes = [
        Route("/", home, methods=["GET"]),
        Route("/console/events", _Events(feed, may_watch, behind_serve), methods=["GET"]),
    ]
    for path, asset in load_assets().items():
        routes.append(Route(path, _Page(asset), methods=["GET"]))
    return routes


class _Page:
    """Serves one file. It is a class, because Starlette would wrap a function as an endpoint."""

    def __init__(self, asset: Asset) -> None:
        self._asset = asset

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = dict(self._asset.headers)
        known = dict(scope["headers"]).get(b"if-none-match", b"")
        if known.decode("latin-1") == self._asset.etag:
            await Response(status_code=304, headers=headers)(scope, receive, send)
            return
        await Response(self._asset.body, headers=headers)(scope, receive, send)


class _Events:
    """Sends server-sent events, until the client leaves or the stream is closed."""

    def __init__(
        self, feed: EventStream, may_watch: Callable[[dict[bytes, bytes]], None], behind_serve: bool
    ) -> None:
        self._feed = feed
        self._may_watch = may_watch
        self._behind_serve = behind_serve

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send_response(send, 200, _STREAM, b"")
            return
        stream = self._stream(dict(scope["headers"]), send)
        if self._behind_serve:
            await stream
            return
        try:
            await until_gone(stream, receive)
        except ClientDisconnectedError:
            return

    async def _stream(self, headers: dict[bytes, bytes], send: Send) -> None:
        events = self._feed.events()
        started = False
        try:
            self._may_watch(headers)
            async for data in events:
                if not started:
                    started = True
                    await send(start_response(200, _STREAM))
                await send(body_message(data, more=True))
            await send(body_message())
        except CoeError as error:
            fault = error_response(error)
            await send_response(send, fault.status, fault.headers, fault.body)
        finally:
            await events.aclose()
