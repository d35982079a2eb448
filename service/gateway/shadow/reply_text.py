"""Reads the text of a reply to a chat request as it passes to the client."""

from __future__ import annotations

from typing import Any

import orjson

from service.engine.engine_interface import Message, Send

# Reasons of an end that is not the answer's own.
_CUT = frozenset({"length", "content_filter"})


class ReplyText:
    """An ASGI send that keeps the bytes of a reply, up to a bound, and passes all of them on.

    Args:
        send: Receives every message.
        max_bytes: Longest reply that is kept.
    """

    def __init__(self, send: Send, max_bytes: int) -> None:
        self._send = send
        self._most = max_bytes
        self._parts: list[bytes] = []
        self._size = 0
        self._status = 0
        self._streams = False

    async def __call__(self, message: Message) -> None:
        await self._send(message)
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._streams = any(
                value.startswith(b"text/event-stream") for _, value in message["headers"]
            )
            return
        body = message.get("body", b"")
        self._size += len(body)
        if self._size <= self._most:
            self._parts.append(body)
        else:
            self._parts.clear()

    @property
    def too_long(self) -> bool:
        """Whether the reply has more bytes than are kept."""
        return self._size > self._most

    def text(self) -> str | None:
        """The answer's text; None where it is too long, failed, was cut, or is no plain text."""
        if self._status != 200 or self.too_long:
            return None
        data = b"".join(self._parts)
        return _streamed(data) if self._streams else whole_text(data)


def whole_text(body: bytes) -> str | None:
    """The text of a whole chat completion; None where it is cut or no plain text."""
    try:
        choice = orjson.loads(body)["choices"][0]
        message = choice["message"]
        text = message.get("content")
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError):
        return None
    if choice.get("finish_reason") in _CUT or message.get("refusal") or message.get("tool_calls"):
        return None
    return text if isinstance(text, str) else None


def _streamed(data: bytes) -> str | None:
    pieces: list[str] = []
    ended = False
    for line in data.splitlines():
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        try:
            event: Any = orjson.loads(line[5:])
            if "error" in event:
                return None
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if delta.get("tool_calls") or delta.get("refusal"):
                    return None
                pieces.append(delta.get("content") or "")
                if (reason := choice.get("finish_reason")) is not None:
                    if reason in _CUT:
                        return None
                    ended = True
        except (orjson.JSONDecodeError, AttributeError, TypeError):
            return None
    return "".join(pieces) if ended else None
