"""A gateway's link to a pool whose machine, network or process does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from service.errors import PoolUnavailableError
from service.rpc import pool_link
from service.rpc.call_headers import Call
from service.rpc.http_connections import ConnectError
from service.rpc.pool_link import PoolAddress, PoolLink, new_session
from tests.support.polling import until


def failed_connect(cause: OSError) -> Exception:
    error = ConnectError(type(cause).__name__)
    error.__cause__ = cause
    return error


def refused_by(number: int) -> Exception:
    return failed_connect(OSError(number, "no connection"))


class SilentPool(PoolLink):
    """A link that follows a pool by `fault` alone: an error for each try, by its number."""

    tries = 0
    fault: Callable[[int], Exception]

    async def _read_snapshots(self) -> None:
        self.tries += 1
        raise self.fault(self.tries)


@asynccontextmanager
async def called(
    fault: Callable[[int], Exception],
) -> AsyncIterator[tuple[SilentPool, asyncio.Task[None]]]:
    """A link with a call in a pool that never answers it."""

    async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while await reader.read(2**16):
                pass

    session = new_session()
    async with await asyncio.start_server(never_answers, "127.0.0.1") as pool:
        url = f"http://127.0.0.1:{pool.sockets[0].getsockname()[1]}"
        link = SilentPool(PoolAddress(url, "cpu", "boot"), session, "s", "g", lambda: None)
        link.fault = fault
        call = Call("/v1/completions", "a", "r1", 60_000, False, "g", link.next_seq("a"))

        async def ask() -> None:
            async with link.call(call, b"{}"):
                pass

        asking = asyncio.create_task(ask())
        try:
            yield link, asking
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await link.close()
            await session.close()


@pytest.fixture(autouse=True)
def reconnects_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_link, "_RECONNECT_S", 0.001)


@pytest.mark.parametrize(
    "error",
    [
        failed_connect(TimeoutError()),
        refused_by(errno.EHOSTUNREACH),
        refused_by(errno.ENETUNREACH),
        refused_by(errno.EHOSTDOWN),
        refused_by(errno.ETIMEDOUT),
    ],
    ids=lambda error: str(error.__cause__.errno),
)
async def test_calls_end_when_the_pool_s_machine_answers_no_connect(error: Exception) -> None:
    async with called(lambda _: error) as (_, asking):
        with pytest.raises(PoolUnavailableError):
            async with asyncio.timeout(60):
                await asking


@pytest.mark.parametrize(
    "fault",
    [
        # Accepted, then silent: a pool that imports vLLM, for example.
        lambda _: TimeoutError(),
        # A process that has gone: the kernel resets its connections itself.
        lambda _: refused_by(errno.ECONNREFUSED),
        lambda _: ValueError("status 503"),
        # One lost connect, as a link with losses has.
        lambda number: failed_connect(TimeoutError()) if number % 2 else ValueError("status"),
    ],
    ids=["silent", "refused", "status", "every other connect"],
)
async def test_calls_go_on_while_the_pool_s_machine_answers(
    fault: Callable[[int], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_link, "_SILENT_S", float("inf"))
    async with called(fault) as (link, asking):
        await until(lambda: link.tries > 20, "many tries")
        assert not asking.done()
        assert link.unseen() == {"a": 1}
