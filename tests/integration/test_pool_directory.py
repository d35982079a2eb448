"""Streams of a pool end after it has left the directory and fallen silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.rpc import pool_link
from service.rpc.call_headers import Call
from service.rpc.pool_directory import PoolDirectory
from service.rpc.pool_link import PoolAddress, PoolLink
from service.rpc.snapshot import ExpertState, Snapshot, encode
from service.types import Residency
from tests.support.in_process_service import serving
from tests.support.polling import until


class Node:
    """A pool's node: until it is cut off, it says what pools say; then nothing, ever."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.cut_off = asyncio.Event()
        self._first = encode(snapshot or Snapshot("boot", "cpu"), None)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        follows = scope["path"] == "/snapshots"
        if not self.cut_off.is_set():
            await send({"type": "http.response.start", "status": 200, "headers": []})
            first = self._first if follows else b"one"
            await send({"type": "http.response.body", "body": first, "more_body": True})
        while follows and not self.cut_off.is_set():
            await send({"type": "http.response.body", "body": b"{}\n", "more_body": True})
            await asyncio.sleep(0.01)
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits 15 s for a pool that says nothing."""
    monkeypatch.setattr(pool_link, "GONE_S", 0.1)
    monkeypatch.setattr(pool_link, "_SILENT_S", 0.3)


def call(seq: int) -> Call:
    return Call("/v1/chat/completions", "a", f"r{seq}", 10_000, True, f"gateway-{seq}", seq)


@asynccontextmanager
async def followed(node: Node) -> AsyncIterator[tuple[PoolDirectory, PoolLink]]:
    """A gateway that follows this pool alone."""
    directory = PoolDirectory("gateway", "secret")
    async with serving(node) as served:
        directory.update([PoolAddress(served.url, "cpu", "boot")])
        await until(lambda: len(directory.links()) == 1, "the pool is followed")
        (link,) = directory.links()
        yield directory, link


async def test_stream_of_a_removed_pool_still_ends() -> None:
    node = Node()
    async with followed(node) as (directory, link):
        async with link.call(call(1), b"{}") as answer:
            assert await answer.body.read(100) == b"one"
            directory.update([])
            assert directory.links() == []
            node.cut_off.set()
            with pytest.raises(ConnectionError):
                async with asyncio.timeout(60):
                    await answer.body.read()
        await until(lambda: not link.follows, "nobody follows it any more")
        await directory.close()


async def test_removed_pool_without_calls_is_closed_at_once() -> None:
    async with followed(Node()) as (directory, link):
        directory.update([])
        await until(lambda: not link.follows, "nobody follows it any more")
        await directory.close()


async def test_directory_close_does_not_wait_for_calls() -> None:
    async with followed(Node()) as (directory, link), link.call(call(1), b"{}") as answer:
        await answer.body.read(100)
        directory.update([])
        await directory.close()
        assert not link.follows


async def test_pool_of_many_experts_is_followed() -> None:
    state = ExpertState(Residency.HOST, 1.5, 0.25, 3, "", True, 4096, {"device": "x" * 60})
    experts = {f"expert-{number}": state for number in range(8000)}
    snapshot = Snapshot("boot", "cpu", experts=experts)
    assert len(encode(snapshot, None)) > 2**20
    async with followed(Node(snapshot)) as (directory, link):
        await until(
            lambda: link.snapshot is not None and link.snapshot.experts == experts,
            "its whole state was read",
        )
        await directory.close()
