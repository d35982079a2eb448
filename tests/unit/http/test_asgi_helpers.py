"""Reading bodies and lines, and cancelling work when the client disconnects."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BodyTooLargeError, InvalidRequestError
from service.http.asgi_helpers import (
    ClientDisconnectedError,
    LineBuffer,
    Message,
    Receive,
    read_body,
    until_gone,
)


def receiving(*messages: Message) -> Receive:
    waiting = list(messages)

    async def receive() -> Message:
        return waiting.pop(0)

    return receive


def part(data: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_read_body_in_one_or_several_parts() -> None:
    assert await read_body(receiving(part(b"abc", False)), 3) == b"abc"
    parts = receiving(part(b"a", True), part(b"", True), part(b"bc", False))
    assert await read_body(parts, 3) == b"abc"


async def test_read_body_above_the_limit_stops_reading() -> None:
    with pytest.raises(BodyTooLargeError, match="larger than the 2 bytes"):
        await read_body(receiving(part(b"abc", False)), 2)
    with pytest.raises(BodyTooLargeError):
        await read_body(receiving(part(b"ab", True), part(b"c", True)), 2)


async def test_read_body_client_disconnect_raises() -> None:
    with pytest.raises(ClientDisconnectedError):
        await read_body(receiving(part(b"a", True), {"type": "http.disconnect"}), 9)


async def test_until_gone_cancels_the_work_on_disconnect() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(ClientDisconnectedError):
        await until_gone(work(), receiving({"type": "http.disconnect"}))
    assert ended.is_set()


async def test_until_gone_raises_the_work_s_error() -> None:
    async def work() -> None:
        raise InvalidRequestError("no")

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(InvalidRequestError):
        await until_gone(work(), never)
    await asyncio.sleep(0)  # the watch ends in its own turn
    assert len(asyncio.all_tasks()) == 1


@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"a", b"\n")), max_size=12))
def test_line_buffer_returns_whole_lines_and_every_byte_once(pieces: list[bytes]) -> None:
    buffer = LineBuffer()
    given_out = [buffer.take(piece, ends=False) for piece in pieces]
    assert all(item == b"" or item.endswith(b"\n") for item in given_out)
    whole = b"".join(pieces)
    assert b"".join(given_out) == whole[: whole.rfind(b"\n") + 1]
    assert b"".join(given_out) + buffer.take(b"", ends=True) == whole
    assert buffer.take(b"x", ends=False) == b""
    buffer.drop()
    assert buffer.take(b"y", ends=True) == b"y"
