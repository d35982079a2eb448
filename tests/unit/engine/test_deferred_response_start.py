"""Held replies: nothing goes out before its first byte, and errors take OpenAI's shape."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.engine.deferred_response_start import DeferredStartSend, openai_error, sse_error
from service.engine.engine_interface import Message


class Sink:
    """An ASGI send that keeps what it was given."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def __call__(self, message: Message) -> None:
        self.sent.append(message)


def start(status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": []}


def body(data: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


async def test_deferred_start_holds_the_head_until_the_first_byte() -> None:
    sink = Sink()
    reply = DeferredStartSend(sink)
    await reply(start())
    await reply(body(b"", more=True))
    assert sink.sent == []
    assert not reply.started
    await reply(body(b"data: 1\n\n", more=True))
    await reply(body(b""))
    assert [m["type"] for m in sink.sent] == ["http.response.start"] + ["http.response.body"] * 2
    assert reply.started


async def test_deferred_start_error_reply_is_held_until_its_end() -> None:
    sink = Sink()
    reply = DeferredStartSend(sink)
    await reply(start(400))
    await reply(body(b'{"error": {"message": "no ', more=True))
    assert reply.error is None
    await reply(body(b'good", "param": "n"}}'))
    assert sink.sent == []
    assert reply.error is not None
    assert reply.error[0] == 400
    await reply.send_error()
    assert sink.sent[0]["status"] == 400
    assert orjson.loads(sink.sent[1]["body"])["error"] == {
        "message": "no good",
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }


async def test_deferred_start_error_as_first_event_becomes_an_http_status() -> None:
    sink = Sink()
    reply = DeferredStartSend(sink)
    await reply(start())
    await reply(body(b'data: {"error": {"message": "dead", "code": 500}}\n\n', more=True))
    await reply(body(b"data: [DONE]\n\n"))
    assert sink.sent == []
    assert reply.error is not None
    assert reply.error[0] == 500


async def test_deferred_start_later_error_event_is_passed_on() -> None:
    sink = Sink()
    reply = DeferredStartSend(sink)
    await reply(start())
    await reply(body(b"data: 1\n\n", more=True))
    await reply(body(b'data: {"error": {"message": "dead"}}\n\n'))
    assert reply.error is None
    assert b"dead" in sink.sent[-1]["body"]


@pytest.mark.parametrize(
    ("status", "given", "message", "kind", "code"),
    [
        (400, b'{"error": {"message": "m", "code": "c"}}', "m", "invalid_request_error", "c"),
        (400, b'{"error": {"message": "m", "code": 400}}', "m", "invalid_request_error", None),
        (404, b'{"detail": "Not Found"}', "Not Found", "not_found_error", None),
        (422, b'{"error": "plain words"}', "plain words", "invalid_request_error", None),
        (500, b"<html>", "the engine answered with status 500", "server_error", "engine_error"),
        (503, b"", "the engine answered with status 503", "server_error", "engine_error"),
        (400, b"[1]", "the engine answered with status 400", "invalid_request_error", None),
        (401, b'{"message": "who"}', "who", "authentication_error", None),
        (429, b'{"message": "slow"}', "slow", "rate_limit_error", None),
        (
            400,
            b'{"message": "the maximum context length is 8 tokens"}',
            "the maximum context length is 8 tokens",
            "invalid_request_error",
            "context_length_exceeded",
        ),
    ],
)
def test_deferred_start_any_error_body_gets_openai_s_shape(
    status: int, given: bytes, message: str, kind: str, code: str | None
) -> None:
    data: dict[str, Any] = orjson.loads(openai_error(status, given))["error"]
    assert data == {"message": message, "type": kind, "param": None, "code": code}


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error": {"message": "m", "code": 404}}\n\n', 404),
        (b'data: {"error": {"message": "m", "code": "x"}}\n\n', 500),
        (b"event: error\ndata: nonsense\n\n", 500),
        (b'data: {"error": "m"}\n\n', 500),
    ],
)
def test_status_of_error_event_is_read_from_its_code(event: bytes, status: int) -> None:
    assert sse_error(event)[0] == status


async def test_deferred_start_after_shut_sends_nothing() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    reply = DeferredStartSend(send)
    reply.discard()
    await reply({"type": "http.response.start", "status": 200, "headers": []})
    await reply({"type": "http.response.body", "body": b"null"})
    assert sent == []
    assert not reply.started
