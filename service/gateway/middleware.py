"""What is done about an exception that nobody thought of, around every endpoint."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from service.errors import CoeError
from service.http.asgi import Message, Receive, Send, send_response
from service.http.endpoints import ENDPOINTS
from service.http.openai_errors import dialect_of, error_response

log = logging.getLogger("coe.api")

# They see to it themselves, and carry every token.
_PROMPTS = frozenset(ENDPOINTS)


class InternalErrorMiddleware:
    """Middleware: an error of our shape for the client, its kind and place for the log.

    A server would log its text, which may quote a prompt, and answer with a bare line.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _PROMPTS:
            await self._app(scope, receive, send)
            return
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            log.exception("a request failed unexpectedly")
            if started:
                # Cutting it short is all that is left.
                raise ConnectionResetError(CoeError.code) from None
            fault = error_response(
                CoeError("something went wrong here; the log has its kind and place"),
                dialect_of(scope["path"]),
            )
            await send_response(send, fault.status, fault.headers, fault.body)
