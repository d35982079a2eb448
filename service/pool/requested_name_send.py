"""An ASGI send that puts the name that was asked for into an answer."""

from __future__ import annotations

from service.engine.engine_interface import Message, Send
from service.http.asgi_helpers import LineBuffer
from service.http.reply_model_name import rename_lines, rename_reply


class RenamedSend:
    """Renames the model in an answer of an engine that knows it by another name.

    Events of a stream pass one by one. The start of another answer waits for its body, because
    another name may change the body's length.

    Args:
        send: Receives the messages.
        name: The name that the client asked for.
    """

    def __init__(self, send: Send, name: str) -> None:
        self._send = send
        self._name = name
        self._start: Message | None = None
        self._is_stream = False
        self._lines = LineBuffer()
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"]
            self._is_stream = any(v.startswith(b"text/event-stream") for _, v in headers)
            if self._is_stream:
                await self._send(message)
            else:
                self._start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._is_stream:
            lines = rename_lines(self._lines.take(body, ends=not more), self._name)
            if lines or not more:
                await self._send({**message, "body": lines})
            return
        self._parts.append(body)
        if more or self._start is None:
            return
        body = rename_reply(b"".join(self._parts), self._name)
        start, self._start = self._start, None
        headers = [pair for pair in start["headers"] if pair[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**start, "headers": headers})
        await self._send({**message, "body": body})
