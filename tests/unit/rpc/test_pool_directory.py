"""A gateway's links to pools: calls on their way, and what pools tell of their experts."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.errors import PoolUnavailableError
from service.rpc.call_headers import Call
from service.rpc.pool_directory import PoolDirectory, followed_subset
from service.rpc.pool_link import PoolAddress, PoolLink, new_session
from service.rpc.snapshot import ExpertState, Snapshot, decode, encode
from service.types import Residency
from tests.support.in_process_service import serving
from tests.support.polling import until


def snapshot_of(**experts: int) -> Snapshot:
    """A pool with these experts, and each one's context."""
    states = {
        name: ExpertState(Residency.DEVICE, max_model_len=length)
        for name, length in experts.items()
    }
    return Snapshot("boot", "cpu", seq=1, experts=states)


def nobody_s_address() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{one.getsockname()[1]}"


@asynccontextmanager
async def linked(url: str) -> AsyncIterator[PoolLink]:
    session = new_session()
    link = PoolLink(PoolAddress(url, "cpu", "boot"), session, "secret", "gateway", lambda: None)
    try:
        yield link
    finally:
        await link.close()
        await session.close()


def call(link: PoolLink) -> Call:
    seq = link.next_seq("a")
    return Call("/v1/completions", "a", f"r{seq}", 1000, False, "gateway", seq)


async def closes_at_once(scope: Any, receive: Any, send: Any) -> None:
    raise ConnectionResetError("a pool that ends before it has answered")


async def never_answers(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(60)


async def test_link_follows_on_after_a_listener_that_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def tells_one_snapshot(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": encode(snapshot_of(a=8), None)})

    async with serving(tells_one_snapshot) as pool, linked(pool.url) as link:
        heard: list[int] = []

        def listener(boot: str, snapshot: Snapshot, delta: object) -> None:
            heard.append(snapshot.seq)
            raise KeyError(boot)

        link._received = listener
        await until(lambda: len(heard) > 1, "another stream was read")
        assert link.follows
    assert "could not be taken over" in caplog.text


async def test_unseen_after_calls_that_never_connected_is_empty() -> None:
    async with linked(nobody_s_address()) as link:
        for _ in range(40):
            with pytest.raises(PoolUnavailableError):
                async with link.call(call(link), b"{}"):
                    pass
        assert link.unseen() == {}


async def test_unseen_after_a_pool_that_broke_off_is_empty() -> None:
    async with serving(closes_at_once) as served, linked(served.url) as link:
        try:
            async with link.call(call(link), b"{}") as reply:
                assert reply.status >= 500
        except PoolUnavailableError:
            pass
        assert link.unseen() == {}


async def test_unseen_counts_a_waiting_call_and_not_one_whose_client_left() -> None:
    async with serving(never_answers) as served, linked(served.url) as link:

        async def ask() -> None:
            async with link.call(call(link), b"{}"):
                pass

        asking = asyncio.create_task(ask())
        await until(lambda: link.unseen() == {"a": 1}, "it is on its way")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert link.unseen() == {}


async def test_unseen_counts_only_calls_after_the_last_acknowledged_one() -> None:
    async with linked(nobody_s_address()) as link:
        seqs = [link.next_seq(name) for name in ("a", "b", "a")]
        acks = {"gateway": seqs[1], "other": 99}
        link.receive_snapshot(Snapshot("boot", "cpu", seq=1, acks=acks))
        assert link.unseen() == {"a": 1}


async def test_context_of_an_expert_is_the_largest_of_all_pools() -> None:
    directory = PoolDirectory("gateway", "secret")
    url = nobody_s_address()
    directory.update([PoolAddress(url, "cpu", boot) for boot in ("one", "two")])
    one, two = directory.followed["one"], directory.followed["two"]
    assert directory.context("a") == 0
    one.receive_snapshot(snapshot_of(a=100, b=7))
    two.receive_snapshot(snapshot_of(a=300))
    assert (directory.context("a"), directory.context("b"), directory.context("c")) == (300, 7, 0)
    two.receive_snapshot(snapshot_of(a=50))
    assert directory.context("a") == 100
    directory.update([PoolAddress(url, "cpu", "two")])
    assert (directory.context("a"), directory.context("b")) == (50, 0)
    await directory.close()


async def test_context_of_many_experts_reads_each_pool_once_per_snapshot() -> None:
    """However many experts a request may ask: pools are not looked through for each of them."""
    reads = 0

    class Counted(dict[str, ExpertState]):
        def items(self) -> Any:
            nonlocal reads
            reads += 1
            return super().items()

    names = [f"e{i}" for i in range(100)]
    directory = PoolDirectory("gateway", "secret")
    url = nobody_s_address()
    directory.update([PoolAddress(url, "cpu", f"b{p}") for p in range(20)])
    for link in directory.followed.values():
        states = Counted({name: ExpertState(Residency.HOST, max_model_len=9) for name in names})
        link.receive_snapshot(Snapshot("boot", "cpu", seq=1, experts=states))
    assert all(directory.context(name) == 9 for _ in range(50) for name in names)
    assert reads == 20
    link = directory.followed["b0"]
    assert link.snapshot is not None
    heartbeat = encode(Snapshot("boot", "cpu", seq=2, experts=link.snapshot.experts), link.snapshot)
    link.receive_snapshot(*decode(heartbeat, link.snapshot))
    assert directory.context("e0") == 9
    assert reads == 20, "a line that tells of other things than experts changes nothing"
    await directory.close()


addresses = st.lists(
    st.builds(PoolAddress, st.just("http://h:1"), st.sampled_from("abcdefgh"), st.uuids().map(str)),
    max_size=300,
    unique_by=lambda address: address.boot,
)


@settings(max_examples=60, deadline=None)
@given(addresses, st.text(max_size=8))
def test_followed_subset_is_bounded_and_has_pools_of_every_kind(
    pools: list[PoolAddress], gateway: str
) -> None:
    followed = followed_subset(gateway, pools)
    of_kind = Counter(address.kind for address in pools)
    kept = Counter(address.kind for address in followed)
    assert set(followed) <= set(pools)
    assert len(set(followed)) == len(followed) == min(64, len(pools))
    assert all(kept[kind] >= min(4, count) for kind, count in of_kind.items())


@settings(max_examples=40, deadline=None)
@given(addresses, st.integers(0, 299))
def test_followed_subset_changes_little_when_a_pool_ends(pools: list[PoolAddress], at: int) -> None:
    assume(pools)
    gone = pools[at % len(pools)]
    before = set(followed_subset("g", pools))
    after = set(followed_subset("g", [one for one in pools if one is not gone]))
    assert before - after <= {gone}
    # Its place is taken by the next of its kind, or by the next of all.
    assert len(after - before) <= 1


def test_followed_subset_of_many_kinds_may_be_larger() -> None:
    pools = [PoolAddress("http://h:1", f"k{i % 40}", str(i)) for i in range(400)]
    followed = Counter(address.kind for address in followed_subset("g", pools))
    assert sum(followed.values()) == 160
    assert set(followed.values()) == {4}
