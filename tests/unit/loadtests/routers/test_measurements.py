"""What is measured of a gateway, against the fake upstream in the same event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from loadtests.lib.fake_openai_server import Upstream
from loadtests.lib.load_client import Target
from loadtests.routers import measurements
from loadtests.routers.measurements import Side, latencies, load, stream_delay


@asynccontextmanager
async def _side(make: Callable[[], Upstream | _Refuses]) -> AsyncIterator[Side]:
    made: list[Upstream | _Refuses] = []

    def recorded() -> asyncio.Protocol:
        made.append(make())
        return made[-1]

    server = await asyncio.get_running_loop().create_server(recorded, "127.0.0.1", 0)
    try:
        yield Side("direct", Target("127.0.0.1", server.sockets[0].getsockname()[1]), None)
    finally:
        server.close()
        for protocol in made:
            protocol._transport.abort()
        await asyncio.sleep(0)  # the transports close in the loop's next turn
        await asyncio.sleep(0)


class _Refuses(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(b"HTTP/1.1 503 X\r\ncontent-length: 4\r\n\r\nbusy")


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "CHUNKS", 4)
    monkeypatch.setattr(measurements, "STREAM_S", 0.02)


async def test_load_counts_good_replies_and_their_times() -> None:
    async with _side(lambda: Upstream(0.0, 0.01)) as side:
        found = await load(side, "fake", 3, 0.2)
    assert found.in_flight == 3
    assert found.errors == 0
    assert found.replies_per_s > 0
    assert found.p99_ms >= 9


async def test_load_of_a_server_that_refuses_is_out_of_bounds() -> None:
    async with _side(_Refuses) as side:
        found = await load(side, "fake", 3, 0.05)
    assert found.errors == 1
    assert not found.within


async def test_load_of_nobody_is_out_of_bounds() -> None:
    async with _side(_Refuses) as side:
        pass
    assert not (await load(side, "fake", 3, 0.05)).within


async def test_latencies_take_turns_and_leave_the_warm_up_out() -> None:
    async with _side(lambda: Upstream(0.0)) as one, _side(lambda: Upstream(0.0)) as other:
        sides = [one, Side("other", other.target, None)]
        found = await latencies(sides, "fake", 20)
    assert {name: len(times) for name, times in found.items()} == {"direct": 18, "other": 18}
    assert all(ms > 0 for times in found.values() for ms in times)


async def test_latencies_of_a_broken_reply_name_the_gateway() -> None:
    async with _side(_Refuses) as side:
        with pytest.raises(RuntimeError, match="direct: status 503: busy"):
            await latencies([side], "fake", 3)


@pytest.mark.usefixtures("_short")
async def test_stream_delay_is_finite_for_whole_streams() -> None:
    async with _side(lambda: Upstream(0.005, stamped=True)) as side:
        delay_ms = await stream_delay(side, "fake", 4, 1.0)
    assert 0 < delay_ms < math.inf


@pytest.mark.usefixtures("_short")
async def test_stream_delay_is_infinite_for_streams_that_are_not_whole() -> None:
    async with _side(_Refuses) as side:
        assert await stream_delay(side, "fake", 4, 0.05) == math.inf
