"""Reading bodies and lines, and cancelling work when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BodyTooLargeError, InvalidRequestError
from service.http.asgi_helpers import (
    WHEN_GONE,
    ClientDisconnectedError,
    LineBuffer,
    Message,
    Receive,
    read_body,
    until_gone,
)
from tests.support.polling import until


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

    with pytest.raises(InvalidRequestError):
        await until_gone(work(), never)
    await asyncio.sleep(0)  # the watch ends in its own turn
    assert len(asyncio.all_tasks()) == 1


async def never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_until_gone_cancelled_from_outside_is_a_cancellation() -> None:
    asking = asyncio.create_task(until_gone(asyncio.sleep(60), never))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_until_gone_work_that_ends_in_spite_of_it_is_still_a_disconnect() -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    with pytest.raises(ClientDisconnectedError):
        await until_gone(stubborn(), receiving({"type": "http.disconnect"}))
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "nothing of it is left for what the task does next"


async def test_until_gone_within_a_timeout_tells_the_two_apart() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await until_gone(asyncio.sleep(60), never)
    with pytest.raises(ClientDisconnectedError):
        async with asyncio.timeout(60):
            await until_gone(asyncio.sleep(60), receiving({"type": "http.disconnect"}))


async def test_until_gone_connection_that_can_t_be_read_is_a_disconnect() -> None:
    async def broken() -> Message:
        raise ConnectionResetError

    with pytest.raises(ClientDisconnectedError):
        await until_gone(asyncio.sleep(60), broken)


async def test_until_gone_with_a_server_that_tells_needs_no_task() -> None:
    told: list[Callable[[], None] | None] = []
    scope = {"extensions": {WHEN_GONE: told.append}}
    await until_gone(asyncio.sleep(0), never, scope)
    assert told[0] is not None
    assert told[1:] == [None], "it wants to be told no more"

    asking = asyncio.create_task(until_gone(asyncio.sleep(60), never, scope))
    await until(lambda: len(told) == 3, "it asks to be told")
    assert len(asyncio.all_tasks()) == 2
    leave = told[2]
    assert leave is not None
    leave()
    with pytest.raises(ClientDisconnectedError):
        await asking


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
