"""Lets requests that carry a prompt reach the gateway past Ray Serve's layers.

Serve starts a gateway's HTTP server, checks its health, tells HAProxy its port and drains it. For
each request it also makes ids, contexts, tasks, metrics and a log line, which cost a seventh of the
gateway's processor time and are kept by the gateway itself anyway. HAProxy marks the requests whose
clients the gateway watches. Here they go to the gateway at once, and all others to Serve. Serve
does not count them: uvicorn waits for them when Serve stops its server.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, cast

from uvicorn.config import HTTP_PROTOCOLS

from service.deployment.coalescing_protocol import CoalescingProtocol
from service.http.prompt_endpoints import ENDPOINTS

App = Callable[[Any, Any, Any], Awaitable[None]]

_ID = b"x-request-id"
_WATCHED = (b"x-request-disconnect-disabled", b"?1")
_PROMPTS = frozenset(ENDPOINTS)


class DirectPromptProtocol(CoalescingProtocol):
    """The HTTP protocol of a gateway's server.

    Args:
        gateway: The gateway's application.
        given: What uvicorn gives a protocol; its application is Serve's.
    """

    def __init__(self, gateway: App, **given: Any) -> None:
        super().__init__(**given)
        self._gateway = gateway
        self._serve = cast(App, self.app)
        self.app = cast(Any, self._answer)

    def on_headers_complete(self) -> None:
        """Begin to answer a request, with the id that Serve would have put into its reply."""
        super().on_headers_complete()
        if self.cycle is None or self.cycle.scope is not self.scope or not _is_direct(self.scope):
            return
        headers = cast(list[tuple[bytes, bytes]], self.scope["headers"])
        given = next((value for name, value in headers if name == _ID), None)
        if given is None:
            given = secrets.token_hex(16).encode()
            headers.append((_ID, given))
        # The task that answers has not run yet.
        self.cycle.default_headers = [*self.cycle.default_headers, (_ID, given)]

    def _answer(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        app = self._gateway if _is_direct(scope) else self._serve
        return app(scope, receive, send)


def _is_direct(scope: Any) -> bool:
    return scope["method"] == "POST" and scope["path"] in _PROMPTS and _WATCHED in scope["headers"]


def use_by_default(gateway: App) -> None:
    """Make it the protocol of servers that name none, such as the one around a Serve replica.

    Args:
        gateway: The application of this process's gateway.
    """
    made = cast(Any, partial(DirectPromptProtocol, gateway))
    HTTP_PROTOCOLS["auto"] = made
