"""Writes of one turn of the event loop become one; their order and the ends stay."""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import pytest

from service.deployment.coalescing_protocol import CoalescingTransport
from service.http.asgi_helpers import WHEN_GONE, ClientDisconnectedError, until_gone
from tests.support.in_process_service import serving
from tests.support.polling import until


class Wire:
    """A transport that records what reaches it."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed, "nothing may be written after the end"
        self.writes.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> str:
        return f"the wire's {name}"


@pytest.fixture
async def joined() -> tuple[CoalescingTransport, Wire]:
    wire = Wire()
    loop = asyncio.get_running_loop()
    return CoalescingTransport(cast(asyncio.Transport, wire), loop), wire


Joined = tuple[CoalescingTransport, Wire]


async def test_writes_of_one_turn_are_one(joined: Joined) -> None:
    transport, wire = joined
    for piece in (b"head ", b"", b"body ", b"end"):
        transport.write(piece)
    assert wire.writes == []
    await asyncio.sleep(0)
    assert wire.writes == [b"head body end"]
    transport.write(b"next")
    await asyncio.sleep(0)
    assert wire.writes == [b"head body end", b"next"]


async def test_much_is_written_within_the_turn(joined: Joined) -> None:
    """Else a sender that never waits would fill the memory, whatever its client reads."""
    transport, wire = joined
    piece, count = bytes(1000), 1000
    for number in range(count):
        transport.write(piece)
        assert (number + 1) * 1000 - sum(map(len, wire.writes)) < 100_000
    await asyncio.sleep(0)
    assert b"".join(wire.writes) == piece * count
    assert len(wire.writes) < count / 50


async def test_close_writes_what_waits_first(joined: Joined) -> None:
    transport, wire = joined
    transport.write(b"last ")
    transport.write(b"words")
    transport.close()
    assert (wire.writes, wire.closed) == ([b"last words"], True)
    await asyncio.sleep(0)
    assert wire.writes == [b"last words"]


async def test_writes_to_a_connection_that_has_ended_are_dropped(joined: Joined) -> None:
    transport, wire = joined
    transport.write(b"late")
    wire.closed = True
    await asyncio.sleep(0)
    transport.write(b"later")
    await asyncio.sleep(0)
    assert wire.writes == []


async def test_everything_else_is_the_transport_s_own(joined: Joined) -> None:
    transport, _ = joined
    assert transport.get_extra_info("socket") == "the wire's socket"
    assert not transport.is_closing()


async def test_client_that_reads_nothing_stops_a_sender_that_never_waits() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while sent < 2**28:
            await send({"type": "http.response.body", "body": bytes(2**10), "more_body": True})
            sent += 2**10

    async with serving(app) as served:
        parts = urlsplit(served.url)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**10)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: sent > 0, "it begins")
        before = -1
        while before < sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 2**26
        writer.transport.abort()


@pytest.mark.parametrize("length", [None, 9], ids=["chunked", "with a length"])
async def test_served_replies_are_whole_and_the_connection_is_kept(length: int | None) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % length)] if length else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in (b"one", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": b"six"})

    async with serving(app) as served:
        connector = aiohttp.TCPConnector(limit=1)
        async with aiohttp.ClientSession(connector=connector) as client:
            for _ in range(3):
                async with client.get(served.url) as reply:
                    assert await reply.read() == b"onetwosix"


@pytest.mark.parametrize("when", ["while it runs", "before it asks"])
async def test_request_whose_client_leaves_is_told(when: str) -> None:
    began, asked, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        if when == "before it asks":
            while (await receive())["type"] != "http.disconnect":
                pass
        asked.set()
        try:
            await until_gone(asyncio.sleep(3600), receive, scope)
        except ClientDisconnectedError:
            ended.set()

    async with serving(app) as served:
        parts = urlsplit(served.url)
        _, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await (began if when == "before it asks" else asked).wait()
        writer.transport.abort()
        await ended.wait()


async def test_request_that_has_ended_is_not_told_and_the_next_one_is() -> None:
    told: list[str] = []
    again = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        name = scope["path"]
        when_gone = scope["extensions"][WHEN_GONE]
        when_gone(lambda: told.append(name))
        if name == "/first":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            await again.wait()
            when_gone(None)  # later than the next request begins
            return
        again.set()
        await until(lambda: told != [], "the client leaves")

    async with serving(app) as served:
        parts = urlsplit(served.url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /second HTTP/1.1\r\nhost: x\r\n\r\n")
        await again.wait()
        await asyncio.sleep(0)
        writer.transport.abort()
        await until(lambda: told != [], "the client leaves")
    assert told == ["/second"]
