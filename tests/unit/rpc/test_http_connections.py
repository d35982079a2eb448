"""Connections for calls: what comes back, what is used again, and what every end looks like."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.rpc.http_connections import ConnectError, HttpConnections, HttpReply, LineReader
from tests.support.polling import until

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n"
WHOLE = HEAD + b"content-length: 5\r\n\r\nhello"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Reads requests with a body of two bytes, and writes what it is told."""

    def __init__(self, answer: Answer) -> None:
        self.requests: list[bytes] = []
        self.opened = self.closed = 0
        self._answer = answer

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.opened += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.requests.append(head + await reader.readexactly(2))
                await self._answer(writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed += 1
            writer.close()


def saying(*pieces: bytes) -> Answer:
    """Write these pieces, each in its own packet."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)

    return answer


def ending(*pieces: bytes) -> Answer:
    """Write these pieces, and end the connection."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        await saying(*pieces)(writer)
        raise ConnectionError

    return answer


@asynccontextmanager
async def connected(answer: Answer) -> AsyncIterator[tuple[HttpConnections, Server]]:
    server = Server(answer)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    connections = HttpConnections("127.0.0.1", port, 2.0)
    try:
        yield connections, server
    finally:
        connections.close()
        listening.close()
        await until(lambda: server.closed == server.opened, "no connection is left")


@asynccontextmanager
async def asked(connections: HttpConnections, **headers: str) -> AsyncIterator[HttpReply]:
    connection = await connections.take()
    try:
        yield await connection.request(connections.head("/path", headers), b"{}")
    finally:
        connections.give_back(connection)


@pytest.mark.parametrize("reply", [WHOLE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_reply_in_pieces_of_any_size_is_read_whole(reply: bytes, size: int) -> None:
    pieces = [reply[at : at + size] for at in range(0, len(reply), size)]
    async with connected(saying(*pieces)) as (connections, server):
        for _ in range(2):
            async with asked(connections, name="value") as got:
                assert (got.status, got.headers["content-type"]) == (200, "text/plain")
                assert await got.body.read() == b"hello"
        assert server.opened == 1, "a connection is used again"
        (first, second) = server.requests
        assert first == second
        lines = first.split(b"\r\n")
        assert lines[0] == b"POST /path HTTP/1.1"
        assert {b"name: value", b"content-length: 2"} < set(lines)
        assert lines[-1] == b"{}"


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("reply", [WHOLE, CHUNKED], ids=["whole", "chunked"])
async def test_interim_replies_before_the_final_one_are_left_out(reply: bytes, size: int) -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    whole = interim + reply
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    async with connected(saying(*pieces)) as (connections, server):
        for _ in range(2):
            async with asyncio.timeout(60), asked(connections) as got:
                assert (got.status, "link" in got.headers) == (200, False)
                assert await got.body.read() == b"hello"
        assert server.opened == 1, "a connection is used again"


async def test_interim_reply_without_a_final_one_is_no_reply() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n"
    async with connected(ending(interim)) as (connections, _):
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(60), asked(connections):
                pass


@pytest.mark.parametrize("version", [b"HTTP/1.0", b"HTTP/1.1"])
async def test_reply_without_a_length_ends_with_the_connection(version: bytes) -> None:
    head = version + b" 200 OK\r\ncontent-type: text/plain\r\n\r\n"
    async with connected(ending(head, b"hel", b"lo")) as (connections, server):
        for _ in range(2):
            async with asyncio.timeout(60), asked(connections) as reply:
                assert await reply.body.read() == b"hello"
        assert server.opened == 2


async def test_reply_without_a_length_that_we_cut_off_is_not_whole() -> None:
    head = b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\n\r\n"
    answer = saying(head + b"hel")
    async with connected(answer) as (connections, _), asked(connections) as reply:
        assert await reply.body.read(3) == b"hel"
        connections.abort_calls()
        with pytest.raises(ConnectionError):
            await reply.body.read()


async def test_calls_at_once_have_connections_of_their_own() -> None:
    async with connected(saying(WHOLE)) as (connections, server):
        async with asked(connections) as one, asked(connections) as two:
            assert await one.body.read() == await two.body.read() == b"hello"
        assert server.opened == 2


@pytest.mark.parametrize(
    "answer",
    [
        ending(),
        ending(HEAD),
        ending(b"SSH-2.0-OpenSSH_9.6\r\n"),
        ending(HEAD + b"content-length: 5\r\n\r\nhe"),
        ending(HEAD + b"transfer-encoding: chunked\r\n\r\n3\r\nhel\r\n"),
        saying(HEAD + b"transfer-encoding: chunked\r\n\r\nxyz\r\n"),
        saying(b"HTTP/1.1 000 What\r\ncontent-length: 0\r\n\r\n"),
        saying(b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n"),
        saying(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
        saying(HEAD + b"x: " + b"a" * 2**19),
        saying(HEAD, *[b"x: " + b"a" * 2**14 + b"\r\n"] * 32),
        saying(*[b"HTTP/1.1 103 Early Hints\r\nx: " + b"a" * 2**14 + b"\r\n\r\n"] * 32),
    ],
    ids=[
        *("nothing", "half a head", "not HTTP", "half a body", "no last chunk", "bad chunk"),
        *("status 0", "status 999", "another protocol"),
        *("a header without an end", "headers without an end", "interim replies without an end"),
    ],
)
async def test_reply_that_is_not_whole_raises_and_is_not_used_again(answer: Answer) -> None:
    async with connected(answer) as (connections, server):
        for _ in range(2):
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(60), asked(connections) as reply:
                    await reply.body.read()
        assert server.opened == 2


@pytest.mark.parametrize(
    "answer",
    [saying(HEAD + b"connection: close\r\ncontent-length: 5\r\n\r\nhello"), saying(WHOLE + WHOLE)],
    ids=["the server leaves", "more than was asked for"],
)
async def test_connection_that_can_t_be_used_again_is_closed(answer: Answer) -> None:
    async with connected(answer) as (connections, server):
        for _ in range(2):
            async with asked(connections) as reply:
                assert await reply.body.read() == b"hello"
            await until(lambda: server.opened == server.closed, "it is closed")
        assert server.opened == 2


async def test_connection_left_before_the_end_is_closed() -> None:
    async with connected(saying(HEAD + b"content-length: 5\r\n\r\nhe")) as (connections, server):
        async with asked(connections) as reply:
            assert await reply.body.read(2) == b"he"
        await until(lambda: server.closed == 1, "the server notices")


@pytest.mark.parametrize("kib", [100, 520, 600, 700, 760, 1000])
async def test_reply_that_ended_but_was_left_unread_holds_up_no_later_call(kib: int) -> None:
    body = b"x" * (kib << 10)
    first = HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body)
    async with connected(saying(first)) as (connections, server):
        for _ in range(3):
            # Like a client that leaves while it gets a long answer.
            async with asked(connections):
                await asyncio.sleep(0.05)
        async with asyncio.timeout(60), asked(connections) as reply:
            assert await reply.body.read() == body
    assert len(server.requests) == 4


async def test_cancelled_call_is_closed() -> None:
    async with connected(saying()) as (connections, server):

        async def ask() -> None:
            async with asked(connections):
                raise AssertionError("the server says nothing")

        asking = asyncio.create_task(ask())
        await until(lambda: len(server.requests) == 1, "it was sent")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: server.closed == 1, "the server notices")


@pytest.mark.parametrize("end", ["abort_calls", "close"])
async def test_calls_in_flight_end_with_the_connections(end: str) -> None:
    half = saying(HEAD + b"content-length: 5\r\n\r\nhe")
    async with connected(half) as (connections, _), asked(connections) as reply:
        assert await reply.body.read(2) == b"he"
        getattr(connections, end)()
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(60):
                await reply.body.read()


async def test_slow_reader_stops_the_server() -> None:
    sent = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % 2**27)
        while sent < 2**27:
            writer.write(bytes(2**16))
            sent += 2**16
            await writer.drain()

    async with connected(flood) as (connections, _), asked(connections) as reply:
        await until(lambda: sent > 2**19, "it comes")
        before = -1
        while before < sent:  # until nothing more is taken
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 2**26
        size = 0
        while size < 2**27:
            size += len(await reply.body.read(2**18))
        assert await reply.body.read() == b""


async def test_take_without_a_server_raises() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    with pytest.raises(ConnectError, match="ConnectionRefusedError"):
        await HttpConnections("127.0.0.1", port, 2.0).take()


@pytest.mark.parametrize("value", ["a\r\nx-coe-tenant: other", "a\nb", "a\rb"])
def test_header_with_a_line_break_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="line break"):
        HttpConnections("127.0.0.1", 1, 2.0).head("/path", {"name": value})


def test_head_names_an_ipv6_host_in_brackets() -> None:
    assert b"\r\nhost: [::1]:80\r\n" in HttpConnections("::1", 80, 2.0).head("/path", {})


LINES = b"".join(b"%d" % number * (number % 7) + b"\n" for number in range(40))


@given(st.lists(st.integers(0, len(LINES)), max_size=20), st.booleans())
def test_lines_are_passed_on_whole_however_they_are_cut(cuts: list[int], unended: bool) -> None:
    async def run() -> None:
        found: list[bytes] = []
        lines = LineReader(found.append, 100)
        body = LINES + b"rest" * unended
        for begin, end in itertools.pairwise([0, *sorted(cuts), len(body)]):
            lines.feed_data(body[begin:end])
        lines.feed_eof()
        assert found == LINES.splitlines()
        assert lines.ended.result() is None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("most_bytes", "refused"),
    [(10, None), (4, "a line has more than 4 bytes"), (9, "a line has more than 9 bytes")],
)
async def test_line_that_is_too_long_ends_the_reading(most_bytes: int, refused: str | None) -> None:
    found: list[bytes] = []
    lines = LineReader(found.append, most_bytes)
    for piece in (b"ab\n0123", b"456", b"789\ncd\n"):
        lines.feed_data(piece)
    lines.feed_eof()
    if refused is None:
        assert found == [b"ab", b"0123456789", b"cd"]
    else:
        assert found == [b"ab"]
        with pytest.raises(ValueError, match=refused):
            lines.ended.result()


async def test_what_a_line_raises_ends_the_reading_and_no_further_line_is_passed_on() -> None:
    found: list[bytes] = []

    def receive(line: bytes) -> None:
        found.append(line)
        raise KeyError("bad")

    async with connected(saying(HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\na\nb\n\r\n")) as (
        connections,
        _,
    ):
        lines = LineReader(receive, 100)
        connection = await connections.take()
        reply = await connection.request(connections.head("/", {}), b"{}", lines)
        with pytest.raises(KeyError):
            await lines.ended
        connections.give_back(connection)
    assert reply.status == 200
    assert found == [b"a"]


@pytest.mark.parametrize("lost", [False, True])
async def test_lines_end_as_their_body_does(lost: bool) -> None:
    body = b"2\r\na\n\r\n" + b"0\r\n\r\n" * (not lost)
    answer = (ending if lost else saying)(HEAD + b"transfer-encoding: chunked\r\n\r\n" + body)
    async with connected(answer) as (connections, _):
        found: list[bytes] = []
        lines = LineReader(found.append, 100)
        connection = await connections.take()
        await connection.request(connections.head("/", {}), b"{}", lines)
        if lost:
            with pytest.raises(ConnectionError):
                await lines.ended
        else:
            await lines.ended
        connections.give_back(connection)
    assert found == [b"a"]
