"""Middleware around every endpoint: unhandled exceptions become an internal error."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from service.errors import CoeError
from service.http.asgi import Message, Receive, Send, send_response
from service.http.endpoints import ENDPOINTS
from service.http.openai_errors import dialect_of, error_response

log = logging.getLogger("coe.api")

# These endpoints handle their own exceptions, and every token passes through them.
_INFERENCE = frozenset(ENDPOINTS)


class InternalErrorMiddleware:
    """Answers an unhandled exception with an OpenAI error, and logs its type and traceback.

    The server's own handler would log the exception's text, which may quote a prompt.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _INFERENCE:
            await self._app(scope, receive, send)
            return
        started = False

        async def tracked_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, tracked_send)
        except Exception:
            log.exception("unhandled exception in an endpoint")
            if started:
                # The reply has begun, so it can only be cut short.
                raise ConnectionResetError(CoeError.code) from None
            response = error_response(
                CoeError("internal error; the log holds its type and traceback"),
                dialect_of(scope["path"]),
            )
            await send_response(send, response.status, response.headers, response.body)
