"""An ASGI send that delays the start of a response until the first byte of its body is known.

vLLM sends status 200 for a stream before the engine has produced anything, and it reports errors
in its own JSON format. A delayed response can still become an HTTP error until its first byte.
"""

from __future__ import annotations

from typing import Any

import orjson

from service.engine.engine_interface import Message, Send
from service.http.asgi_helpers import send_json

_SSE_ERROR = (b'data: {"error"', b"event: error")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class DeferredStartSend:
    """An ASGI send that delays the response start and converts errors to OpenAI's form.

    An error is kept in `error` instead of being sent. The caller may then call `send_error`.

    Args:
        send: Receives the delayed and converted messages.

    Attributes:
        started: Whether anything was sent.
        error: The status and the body of an error response, if there was an error.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._discards = False
        self.started = False
        self.error: tuple[int, bytes] | None = None

    @property
    def failed(self) -> bool:
        """Whether there was no answer, or an error that the client did not cause."""
        return not self.started and (self.error is None or self.error[0] >= 500)

    def discard(self) -> None:
        """Drop all further messages, because the client has left."""
        self._discards = True

    async def __call__(self, message: Message) -> None:
        if self._discards:
            return
        if self.started:
            await self._send(message)
            return
        if message["type"] == "http.response.start":
            self._start = message
            return
        body: bytes = message.get("body", b"")
        more: bool = message.get("more_body", False)
        assert self._start is not None
        status: int = self._start["status"]
        if status >= 400:
            self._parts.append(body)
            if not more:
                self.error = (status, openai_error(status, b"".join(self._parts)))
            return
        if body.startswith(_SSE_ERROR):
            self.error = sse_error(body)
            return
        if self.error is not None or (not body and more):
            return
        self.started = True
        await self._send(self._start)
        await self._send(message)

    async def send_error(self) -> None:
        """Send the error that was kept."""
        assert self.error is not None
        status, body = self.error
        self.started = True
        await send_json(self._send, status, body)


def openai_error(status: int, body: bytes) -> bytes:
    """Convert an error body to OpenAI's format with message, type, param and code."""
    try:
        data: Any = orjson.loads(body)
    except orjson.JSONDecodeError:
        data = None
    detail = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(detail, dict):
        message = detail.get("message") or detail.get("detail") or f"status {status}"
        param, code = detail.get("param"), detail.get("code")
    else:
        message, param, code = detail or f"the engine answered with status {status}", None, None
    if not isinstance(code, str):
        code = "context_length_exceeded" if _about_context(str(message)) else None
        if code is None and status >= 500:
            code = "engine_error"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return orjson.dumps(
        {"error": {"message": str(message), "type": kind, "param": param, "code": code}}
    )


def _about_context(message: str) -> bool:
    return "maximum context length" in message or "maximum model length" in message


def sse_error(event: bytes) -> tuple[int, bytes]:
    """Return the status and the OpenAI body of an error that is the first event of a stream."""
    payload = event.split(b"data: ", 1)[-1].split(b"\n", 1)[0]
    status = 500
    try:
        code = orjson.loads(payload)["error"]["code"]
        if isinstance(code, int) and 400 <= code < 600:
            status = code
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pass
    return status, openai_error(status, payload)
