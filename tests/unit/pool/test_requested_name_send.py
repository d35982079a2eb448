"""Answers of an engine that knows the model by another name, however they are cut."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from service.engine.engine_interface import Message
from service.pool.requested_name_send import RenamedSend

REPLY = orjson.dumps({"id": "1", "model": "held", "text": '"model":"held"'})
STREAM = b"".join(
    b"data: " + orjson.dumps({"model": "held", "choices": [i]}) + b"\n\n" for i in range(4)
)


def sent(kind: bytes, body: bytes, cuts: list[int], *, with_length: bool = True) -> list[Message]:
    """Return the messages of a body that is cut at these places."""
    out: list[Message] = []

    async def send(message: Message) -> None:
        out.append(message)

    async def run() -> None:
        renamed = RenamedSend(send, "a longer name")
        headers = [(b"content-type", kind), (b"x", b"y")]
        if with_length:
            headers.append((b"content-length", str(len(body)).encode()))
        await renamed({"type": "http.response.start", "status": 200, "headers": headers})
        at = [0, *sorted(cut % len(body) for cut in cuts), len(body)]
        for start, end in itertools.pairwise(at):
            more = end < len(body)
            await renamed(
                {"type": "http.response.body", "body": body[start:end], "more_body": more}
            )

    asyncio.run(run())
    return out


def joined(messages: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


CUTS = st.lists(st.integers(0, 1000), max_size=4)


@given(cuts=CUTS)
def test_whole_reply_has_the_name_and_the_length_of_its_body(cuts: list[int]) -> None:
    start, *bodies = sent(b"application/json", REPLY, cuts)
    headers: dict[bytes, Any] = dict(start["headers"])
    assert orjson.loads(joined(bodies)) == orjson.loads(REPLY) | {"model": "a longer name"}
    assert int(headers[b"content-length"]) == len(joined(bodies))
    assert headers[b"x"] == b"y"


@given(cuts=CUTS)
def test_stream_has_the_name_in_each_event_and_passes_events_at_once(cuts: list[int]) -> None:
    start, *bodies = sent(b"text/event-stream", STREAM, cuts, with_length=False)
    assert start["type"] == "http.response.start"
    events = [orjson.loads(line[6:]) for line in joined(bodies).split(b"\n\n") if line]
    assert events == [{"model": "a longer name", "choices": [i]} for i in range(4)]
    assert all(message["body"].endswith(b"\n") for message in bodies[:-1])
    assert bodies[-1]["more_body"] is False
