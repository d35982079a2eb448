"""Memory and Redis stores give equal answers to the same random claims."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store.limit_windows import DAY, MINUTE, MONTH, NOW, fixed
from service.store.memory_store import MemoryStore
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import Account, Charge, Granted, Refused, StoreClaim, UsageNote
from tests.support.redis_server import RedisServer, redis_server

_ids = count()
ACCOUNTS = (
    Account("requests", 7, MINUTE),
    Account("tokens", 1000, MINUTE),
    Account("day", 9 * 10**15, DAY),
    Account("month", 10**6, MONTH),
    Account("window", 500, fixed(90)),
    Account("now", 3, NOW),
)
lines = st.lists(
    st.builds(
        Charge,
        st.sampled_from(ACCOUNTS),
        st.sampled_from([0, 1, 2, 333, 10**15]),
        st.sampled_from([0.0, 0.15, 1.0, 3.7, 1e9]),
    ),
    min_size=1,
    max_size=4,
    unique_by=lambda line: line.account.name,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), lines, st.integers(0, 1000), st.integers(0, 3)),
        st.tuples(
            st.just("settle"),
            st.integers(0, 20),
            st.integers(0, 400),
            st.sampled_from([0, 0, 1, 900, 5000, 3 * 10**6]),
        ),
        st.tuples(st.just("wait"), st.sampled_from([0.1, 1.0, 7.3, 61.0, 90_000.0, 2_700_000.0])),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@settings(max_examples=150, deadline=None)
@given(steps)
def test_memory_and_redis_store_give_equal_answers_to_equal_claims(
    server: RedisServer, steps: list[tuple]
) -> None:
    asyncio.run(_compare(server, steps))


async def _compare(server: RedisServer, steps: list[tuple]) -> None:
    clock_at = [1_700_000_000.123]

    def clock() -> float:
        return clock_at[0]

    client = RedisClient(
        server.url, "me", prefix=f"p{next(_ids)}", timeout_s=5, lease_s=10**9, clock=clock
    )
    # It beats only when asked to: nothing but these steps happens.
    shared = RedisStore(client, share=0, lease_s=10**9)
    try:
        await shared._heartbeat()
        await _same(steps, clock_at, MemoryStore(clock), shared)
    finally:
        await client.close()


async def _same(
    steps: list[tuple], now: list[float], memory: MemoryStore, shared: RedisStore
) -> None:
    held: list[tuple[Granted, Granted]] = []
    for number, step in enumerate(steps):
        match step:
            case ("claim", wanted, tokens, least):
                claim = StoreClaim(f"c{number}", tuple(wanted), tokens, min(least, tokens))
                one, other = await memory.reserve(claim), await shared.reserve(claim)
                assert one == other
                if isinstance(one, Granted):
                    assert isinstance(other, Granted)
                    held.append((one, other))
                else:
                    assert isinstance(one, Refused)
            case ("settle", which, used, over) if held:
                one, other = held.pop(which % len(held))
                # Of sliding windows more may be used than was reserved.
                amounts = [
                    amount + over
                    if over and line.account.window.kind == "sliding"
                    else min(used, amount)
                    for line, amount in zip(one.claim.lines, one.amounts, strict=True)
                ]
                note = UsageNote("n", {"used": sum(amounts)}, 10**6)
                await memory.settle(one, amounts, note)
                await shared.settle(other, amounts, note)
            case ("wait", seconds):
                now[0] += seconds
        assert await memory.balances(ACCOUNTS) == await shared.balances(ACCOUNTS)
