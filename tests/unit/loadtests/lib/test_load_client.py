"""The load generator, against the fake upstream in the same event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from loadtests.lib.fake_openai_server import Upstream
from loadtests.lib.load_client import (
    Asker,
    Exchange,
    Target,
    closed_loop,
    completion_tokens,
    once,
    repeat,
)
from loadtests.routers.chunk_delays import chunk_delays

_BODY = {"model": "m", "messages": [], "max_tokens": 3, "stream": True}


@asynccontextmanager
async def _listening(make: Callable[[], asyncio.Protocol]) -> AsyncIterator[Target]:
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    try:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


class _Says(asyncio.Protocol):
    """Answers anything with the same bytes, and closes if told to."""

    def __init__(self, reply: bytes, close: bool) -> None:
        self._reply, self._close = reply, close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(self._reply)
        if self._close:
            self._transport.close()


async def test_load_client_answers_every_request_once() -> None:
    async with _listening(lambda: Upstream(0.0)) as target:
        turn = await closed_loop(target, once([target.request(_BODY)] * 25), 4)
    assert len(turn.check().exchanges) == 25
    for exchange in turn.exchanges:
        assert exchange.body.count(b"chat.completion.chunk") == 3
        assert 0 < exchange.first_ms <= exchange.total_ms
    assert turn.rate > 0


async def test_load_client_stops_at_the_time_limit() -> None:
    async with _listening(lambda: Upstream(0.0)) as target:
        turn = await closed_loop(target, repeat(target.request(_BODY)), 2, for_s=0.05)
    assert turn.check().exchanges
    assert turn.wall_s < 2


async def test_load_client_first_chunk_precedes_the_end() -> None:
    async with _listening(lambda: Upstream(0.02)) as target:
        asker = Asker(target)
        one = await asker.ask(target.request(_BODY))
        asker.close()
    assert one.total_ms - one.first_ms >= 35


async def test_load_client_reconnects_after_the_server_closes() -> None:
    whole = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 14\r\n\r\ndata: [DONE]\n\n"
    async with _listening(lambda: _Says(whole, close=True)) as target:
        turn = await closed_loop(target, once([target.request(_BODY)] * 6), 2)
    assert len(turn.check().exchanges) == 6


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (b"HTTP/1.1 503 X\r\ncontent-length: 4\r\n\r\nbusy", "status 503: busy"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nhalf", "has no end"),
        (b"nonsense\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 40\r\n\r\nhalf", "closed in mid-reply"),
    ],
)
async def test_load_client_truncated_reply_is_an_error(reply: bytes, fault: str) -> None:
    async with _listening(lambda: _Says(reply, close=True)) as target:
        turn = await closed_loop(target, once([target.request(_BODY)]), 1)
        with pytest.raises(RuntimeError, match=fault):
            turn.check()


def test_load_client_sends_the_api_key() -> None:
    assert b"authorization" not in Target("h", 1).request(_BODY)
    assert b"authorization: Bearer k\r\n" in Target("h", 1, key="k").request(_BODY)


def test_load_client_sends_headers_of_the_target() -> None:
    request = Target("h", 1, headers=(("x-a", "1"), ("x-b", "2"))).request(_BODY)
    assert b"\r\nx-a: 1\r\nx-b: 2\r\n" in request


async def test_load_client_spreads_the_first_requests_and_loses_none() -> None:
    async with _listening(lambda: Upstream(0.0)) as target:
        turn = await closed_loop(
            target, once([target.request(_BODY)] * 8), 4, for_s=60.0, spread_s=0.1
        )
    assert len(turn.check().exchanges) == 8
    # It can't end before the last connection, at 3/4 of the spread, had its turn.
    assert turn.wall_s > 0.07


async def test_load_client_tells_when_each_stamped_chunk_was_read() -> None:
    async with _listening(lambda: Upstream(0.005, stamped=True)) as target:
        asker = Asker(target)
        exchange = await asker.ask(target.request(_BODY))
        asker.close()
    assert len(exchange.parts) == len(exchange.parts_at_s)
    delays = chunk_delays(exchange, 3, exchange.began_s, exchange.ended_s + 1)
    assert len(delays) == 3
    assert min(delays) >= -0.001  # stamps are rounded to microseconds
    assert max(delays) <= exchange.total_ms


def test_load_client_error_event_in_a_stream_is_an_error() -> None:
    one = Exchange(0.0, status=200, parts=[b'data: {"error":{}}\n\n', b"data: [DONE]\n\n"])
    assert "an error in the stream" in str(one.fault())


def test_load_client_reads_usage_from_the_last_chunk() -> None:
    body = b'data: {"usage":null}\n\ndata: {"usage":{"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    assert completion_tokens(body) == 7
    with pytest.raises(ValueError, match="no usage"):
        completion_tokens(b"data: [DONE]\n\n")
