"""The text of a reply, whole and streamed, within a bound."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.engine.engine_interface import Message
from service.gateway.shadow.reply_text import ReplyText


def whole(content: Any, reason: str = "stop", **message: Any) -> bytes:
    choice: dict[str, Any] = {"message": {"content": content, **message}, "finish_reason": reason}
    return orjson.dumps({"choices": [choice]})


def streamed(*pieces: str, reason: str | None = "stop", **delta: Any) -> bytes:
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": piece}}]} for piece in pieces
    ]
    events.append({"choices": [{"delta": delta, "finish_reason": reason}]})
    events.append({"choices": [], "usage": {"completion_tokens": 3}})
    lines = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    return b"".join([*lines, b"data: [DONE]\n\n"])


async def read(body: bytes, *, stream: bool, status: int = 200, most: int = 10_000) -> Any:
    passed: list[Message] = []

    async def send(message: Message) -> None:
        passed.append(message)

    reply = ReplyText(send, most)
    kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
    await reply(
        {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}
    )
    for at in range(0, len(body), 7):
        await reply({"type": "http.response.body", "body": body[at : at + 7], "more_body": True})
    await reply({"type": "http.response.body", "body": b""})
    assert b"".join(message.get("body", b"") for message in passed) == body
    return reply.text()


@pytest.mark.parametrize(
    ("body", "stream", "expected"),
    [
        (whole("hello"), False, "hello"),
        (streamed("hel", "lo é"), True, "hello é"),
        (whole("hel", "length"), False, None),
        (streamed("hel", reason="length"), True, None),
        (streamed("hel", reason=None), True, None),
        (streamed("x", tool_calls=[{"id": "1"}]), True, None),
        (whole(None, tool_calls=[{}]), False, None),
        (b'data: {"error": {"code": "x"}}\n\n', True, None),
        (b"data: {broken\n\n", True, None),
        (b"[]", False, None),
        (b'{"choices": [{"message": "text"}]}', False, None),
    ],
)
async def test_text_of_a_reply(body: bytes, stream: bool, expected: str | None) -> None:
    assert await read(body, stream=stream) == expected


@pytest.mark.parametrize("stream", [False, True])
async def test_reply_beyond_the_bound_or_failed_has_no_text(stream: bool) -> None:
    body = streamed("hello") if stream else whole("hello")
    assert await read(body, stream=stream, most=len(body)) == "hello"
    assert await read(body, stream=stream, most=len(body) - 1) is None
    assert await read(body, stream=stream, status=500) is None
