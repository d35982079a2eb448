"""The link's small parts: the secret's file, a call's headers, bodies, leaving clients."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BodyTooLargeError, InvalidRequestError
from service.http.asgi import (
    ClientDisconnectedError,
    LineBuffer,
    Message,
    Receive,
    read_body,
    until_gone,
)
from service.rpc import auth
from service.rpc.call import Call, parse_call, trace_of

CALL = Call("/v1/completions", "a/b", "id", 250, True, "gateway", 7)


def test_a_secret_is_its_owner_s_alone_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "secret"
    before = os.umask(0)
    try:
        first = auth.make_secret(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.chmod(0o644)
        second = auth.make_secret(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert auth.read_secret(path) == second != first
    assert len(second) >= 43


def test_a_link_in_the_secret_s_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "secret").symlink_to(victim)
    auth.make_secret(tmp_path / "secret")
    assert victim.read_text() == "untouched"


def test_secrets_are_compared_whole() -> None:
    assert auth.same(b"abc", b"abc")
    assert not auth.same(b"ab", b"abc")
    assert not auth.same(b"", b"abc")


def test_a_call_s_headers_come_back() -> None:
    headers = {name.encode(): value.encode() for name, value in CALL.headers().items()}
    assert parse_call("/v1/completions", headers) == CALL


@pytest.mark.parametrize("missing", sorted(CALL.headers()))
def test_a_call_without_a_header_is_refused(missing: str) -> None:
    headers = {n.encode(): v.encode() for n, v in CALL.headers().items() if n != missing}
    if missing == "x-coe-stream":
        headers[b"x-coe-stream"] = b"0"
        assert not parse_call("/v1/completions", headers).stream
        return
    with pytest.raises(InvalidRequestError, match=missing):
        parse_call("/v1/completions", headers)


def test_a_call_s_numbers_are_numbers() -> None:
    headers = {n.encode(): v.encode() for n, v in CALL.headers().items()}
    with pytest.raises(InvalidRequestError, match="not a number"):
        parse_call("/v1/completions", {**headers, b"x-coe-seq": b"many"})


def receiving(*messages: Message) -> Receive:
    waiting = list(messages)

    async def receive() -> Message:
        return waiting.pop(0)

    return receive


def part(data: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_a_body_in_one_or_more_parts() -> None:
    assert await read_body(receiving(part(b"abc", False)), 3) == b"abc"
    parts = receiving(part(b"a", True), part(b"", True), part(b"bc", False))
    assert await read_body(parts, 3) == b"abc"


async def test_a_body_over_the_bound_is_not_read_to_its_end() -> None:
    with pytest.raises(BodyTooLargeError, match="larger than the 2 bytes"):
        await read_body(receiving(part(b"abc", False)), 2)
    with pytest.raises(BodyTooLargeError):
        await read_body(receiving(part(b"ab", True), part(b"c", True)), 2)


async def test_a_client_that_leaves_in_its_body() -> None:
    with pytest.raises(ClientDisconnectedError):
        await read_body(receiving(part(b"a", True), {"type": "http.disconnect"}), 9)


async def test_work_is_cancelled_when_the_client_leaves() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(ClientDisconnectedError):
        await until_gone(work(), receiving({"type": "http.disconnect"}))
    assert ended.is_set()


async def test_work_s_fault_goes_through() -> None:
    async def work() -> None:
        raise InvalidRequestError("no")

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(InvalidRequestError):
        await until_gone(work(), never)
    await asyncio.sleep(0)  # the watch ends in its own turn
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("bad", [b"a\x0bb", b"a\rb", b"\xff", b"", b"x" * 10_000])
def test_a_trace_context_that_could_not_be_sent_on_is_left_out(bad: bytes) -> None:
    good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {b"traceparent": good, b"tracestate": bad}
    assert trace_of(headers) == {"traceparent": good.decode()}
    assert trace_of({b"traceparent": bad}) == {}


@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"a", b"\n")), max_size=12))
def test_a_line_buffer_gives_out_whole_lines_and_every_byte_once(pieces: list[bytes]) -> None:
    buffer = LineBuffer()
    given_out = [buffer.take(piece, ends=False) for piece in pieces]
    assert all(one == b"" or one.endswith(b"\n") for one in given_out)
    whole = b"".join(pieces)
    assert b"".join(given_out) == whole[: whole.rfind(b"\n") + 1]
    assert b"".join(given_out) + buffer.take(b"", ends=True) == whole
    assert buffer.take(b"x", ends=False) == b""
    buffer.drop()
    assert buffer.take(b"y", ends=True) == b"y"
