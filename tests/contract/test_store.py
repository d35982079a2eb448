"""The contract of durable stores, tested with memory and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import count

import pytest
import pytest_asyncio

from service.store.limit_windows import DAY, MINUTE, NOW, fixed
from service.store.memory_store import MemoryStore
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import (
    Account,
    AccountBalance,
    Charge,
    Granted,
    Refused,
    Settlement,
    Store,
    StoreClaim,
    UsageNote,
    WorkItem,
)
from service.store.stored_settlement import dumps, loads
from tests.support.polling import until
from tests.support.redis_server import RedisServer, redis_server

_ids = count()
REQUESTS = Account("k/requests", 3, MINUTE)
TOKENS = Account("k/tokens", 100, MINUTE)
COST = Account("k/budget", 1000, DAY)
AT_ONCE = Account("k/concurrent", 2, NOW)


@dataclass
class Clock:
    """Seconds since 1970, moved by hand."""

    now_s: float = 1_700_000_000.5

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Tried:
    """A store, with its clock."""

    store: Store
    clock: Clock

    async def take(self, *lines: Charge, tokens: int = 0, least: int = 0) -> Granted | Refused:
        return await self.store.reserve(StoreClaim(f"c{next(_ids)}", lines, tokens, least))

    async def granted(self, *lines: Charge, tokens: int = 0, least: int = 0) -> Granted:
        got = await self.take(*lines, tokens=tokens, least=least)
        assert isinstance(got, Granted)
        return got

    async def balance(self, account: Account) -> AccountBalance:
        return (await self.store.balances([account]))[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture(params=["memory", "redis"])
async def tried(request: pytest.FixtureRequest) -> AsyncIterator[Tried]:
    clock = Clock()
    if request.param == "memory":
        yield Tried(MemoryStore(clock), clock)
        return
    server: RedisServer = request.getfixturevalue("server")
    # Nothing of one test is seen by the next.
    client = RedisClient(
        server.url, "me", prefix=f"t{next(_ids)}", timeout_s=5, lease_s=10**6, clock=clock
    )
    # No slices: they would count as reserved.
    store = RedisStore(client, share=0, lease_s=10**6, heartbeat_s=0.02)
    await store.start()
    yield Tried(store, clock)
    await store.stop()


async def test_store_grants_no_more_than_the_limit_in_any_minute(tried: Tried) -> None:
    for _ in range(3):
        got = await tried.granted(Charge(REQUESTS, 1))
        await tried.store.settle(got, [1], None)
        tried.clock.now_s += 10
    refused = await tried.take(Charge(REQUESTS, 1))
    assert isinstance(refused, Refused)
    assert refused.account == "k/requests"
    assert refused.retry_after_s is not None
    # The first was in the middle of a second, which counts whole.
    assert 30 <= refused.retry_after_s <= 31
    tried.clock.now_s += refused.retry_after_s - 0.1
    assert isinstance(await tried.take(Charge(REQUESTS, 1)), Refused)
    tried.clock.now_s += 0.1
    await tried.granted(Charge(REQUESTS, 1))
    assert isinstance(await tried.take(Charge(REQUESTS, 1)), Refused)


async def test_settle_returns_what_was_not_used(tried: Tried) -> None:
    got = await tried.granted(Charge(TOKENS, 20, 1), tokens=80, least=1)
    assert got.tokens == 80
    assert (await tried.balance(TOKENS)).reserved == 100
    await tried.store.settle(got, [35], None)
    after = await tried.balance(TOKENS)
    assert (after.spent, after.reserved) == (35, 0)


async def test_settle_more_than_was_reserved_is_a_debt_of_the_next_windows(tried: Tried) -> None:
    got = await tried.granted(Charge(TOKENS, 10))
    tried.clock.now_s += 5
    await tried.store.settle(got, [350], None)
    began_s = tried.clock.now_s
    assert (await tried.balance(TOKENS)).spent == 350
    granted = 0
    while tried.clock.now_s - began_s < 600:
        answer = await tried.take(Charge(TOKENS, 50))
        if isinstance(answer, Granted):
            await tried.store.settle(answer, [50], None)
            granted += 50
            continue
        assert answer.retry_after_s is not None
        tried.clock.now_s += answer.retry_after_s
    # In ten minutes ten times the limit, the debt included; the windows' pieces cost a little.
    assert 350 + granted <= 10 * TOKENS.limit
    assert 350 + granted >= 9 * TOKENS.limit


async def test_settle_request_longer_than_the_window_is_charged_the_excess(
    tried: Tried,
) -> None:
    got = await tried.granted(Charge(TOKENS, 10))
    tried.clock.now_s += 400
    await tried.store.settle(got, [95], None)
    assert (await tried.balance(TOKENS)).spent == 85


async def test_settle_twice_charges_once(tried: Tried) -> None:
    got = await tried.granted(Charge(COST, 10, 2.5), tokens=100)
    for _ in range(3):
        await tried.store.settle(got, [17], UsageNote("n", {"requests": 1}, 1000))
    after = await tried.balance(COST)
    assert (after.spent, after.reserved) == (17, 0)
    assert await tried.store.counts(["n"]) == [{"requests": 1}]


async def test_reserve_clips_the_answer_to_what_every_account_affords(tried: Tried) -> None:
    lines = (Charge(TOKENS, 40, 1), Charge(COST, 100, 30.5))
    got = await tried.granted(*lines, tokens=500, least=1)
    assert got.tokens == 29  # 100 + 29 · 30.5 = 984.5; 40 + 29 of 100
    assert got.amounts == (69, 985)
    refused = await tried.take(*lines, tokens=500, least=1)
    assert isinstance(refused, Refused)


async def test_reserve_takes_from_all_accounts_or_none(tried: Tried) -> None:
    await tried.granted(Charge(AT_ONCE, 2))
    refused = await tried.take(Charge(COST, 10), Charge(AT_ONCE, 1))
    assert refused == Refused("k/concurrent", 1.0, busy=True)
    assert (await tried.balance(COST)).reserved == 0


async def test_reserve_more_than_the_limit_never_succeeds(tried: Tried) -> None:
    refused = await tried.take(Charge(TOKENS, 99, 1), tokens=10, least=2)
    assert refused == Refused("k/tokens", None)


async def test_budget_is_renewed_in_its_next_window(tried: Tried) -> None:
    hourly = Account("b", 10, fixed(3600))
    got = await tried.granted(Charge(hourly, 10))
    busy = await tried.take(Charge(hourly, 1))
    assert busy == Refused("b", 1.0, busy=True)
    await tried.store.settle(got, [10], None)
    spent = await tried.take(Charge(hourly, 1))
    assert isinstance(spent, Refused)
    assert spent.retry_after_s is not None
    assert not spent.busy
    balance = await tried.balance(hourly)
    assert balance.ends_ms - balance.starts_ms == 3_600_000
    assert abs(tried.clock.now_s + spent.retry_after_s - balance.ends_ms / 1000) < 0.002
    tried.clock.now_s += spent.retry_after_s
    await tried.granted(Charge(hourly, 10))


async def test_claim_counts_in_the_window_of_its_admission(tried: Tried) -> None:
    hourly = Account("b", 10, fixed(3600))
    got = await tried.granted(Charge(hourly, 10))
    tried.clock.now_s += 3600
    assert (await tried.balance(hourly)).reserved == 0
    await tried.store.settle(got, [7], None)
    assert (await tried.balance(hourly)).spent == 0
    await tried.granted(Charge(hourly, 10))


async def test_settle_more_than_the_bound_is_charged(tried: Tried) -> None:
    got = await tried.granted(Charge(COST, 10))
    await tried.store.settle(got, [25], None)
    assert (await tried.balance(COST)).spent == 25


async def test_concurrent_claims_take_exactly_the_limit(tried: Tried) -> None:
    many = Account("burst", 137, MINUTE)
    cents = Account("cents", 10**15 + 1, DAY)

    async def one() -> int:
        got = await tried.take(Charge(many, 3), Charge(cents, 10**13))
        if isinstance(got, Refused):
            return 0
        await tried.store.settle(got, [3, 10**13], None)
        return 3

    assert sum(await asyncio.gather(*(one() for _ in range(200)))) == 135
    assert (await tried.balance(many)).spent == 135
    assert (await tried.balance(cents)).spent == 45 * 10**13


async def test_record_replace_succeeds_only_for_the_version_read(tried: Tried) -> None:
    store = tried.store
    assert await store.records("t") == {}
    assert await store.version("t") is None
    odd = b'\x00two \xff"'
    assert await store.replace("t", "a/b", None, odd)
    assert not await store.replace("t", "a/b", None, b"again")
    first = await store.version("t")
    assert first is not None
    assert not await store.replace("t", "a/b", b"other", b"again")
    assert not await store.replace("t", "new", b"other", b"again")
    assert await store.version("t") == first
    assert await store.replace("t", "a/b", odd, b"")
    assert await store.replace("t", "c", None, b"three")
    assert await store.version("t") != first
    assert await store.records("t") == {"a/b": b"", "c": b"three"}
    assert await store.records("u") == {}


async def test_record_concurrent_replacements_lose_none(tried: Tried) -> None:
    async def add_one() -> None:
        while True:
            known = (await tried.store.records("t")).get("n")
            wanted = str(int(known or b"0") + 1).encode()
            if await tried.store.replace("t", "n", known, wanted):
                return

    await asyncio.gather(*(add_one() for _ in range(30)))
    assert await tried.store.records("t") == {"n": b"30"}


async def test_usage_counts_add_up(tried: Tried) -> None:
    for i in range(3):
        got = await tried.granted(Charge(COST, 1))
        await tried.store.settle(got, [1], UsageNote("u/1", {"requests": 1, "tokens": i}, 1000))
    # A claim on nothing is noted all the same.
    await tried.store.settle(await tried.granted(), [], UsageNote("u/1", {"requests": 1}, 1000))

    async def told() -> bool:
        return await tried.store.counts(["u/1", "u/2"]) == [{"requests": 4, "tokens": 3}, {}]

    await until(told, "the notes have added up")


async def test_item_of_work_is_charged_once_whichever_claim_is_settled(tried: Tried) -> None:
    store = tried.store
    item = WorkItem("batch", "1.0")
    note = UsageNote("usage/work", {"requests": 1}, 1000)
    first = await tried.granted(Charge(COST, 400), Charge(TOKENS, 20))
    second = await tried.granted(Charge(COST, 400), Charge(TOKENS, 20))
    await store.settle_once(item, Settlement(first, (300, 25), note))
    for _ in range(2):
        await store.settle_once(item, Settlement(first, (300, 25), note))
        await store.settle_once(item, Settlement(second, (300, 25), note))
    balance = await tried.balance(COST)
    assert (balance.spent, balance.reserved) == (300, 0)
    balance = await tried.balance(TOKENS)
    assert (balance.spent, balance.reserved) == (25, 0)
    assert await store.counts(["usage/work"]) == [{"requests": 1}]
    # Another item of the same group is charged, also where nobody holds its claim any more.
    (stored,) = loads(dumps([Settlement(first, (50, 5), note)]))
    await store.settle_once(WorkItem("batch", "2.0"), stored)
    assert (await tried.balance(COST)).spent == 350
    third = await tried.granted(Charge(COST, 100))
    await store.close_group("batch")
    await store.settle_once(WorkItem("batch", "3.0"), Settlement(third, (60,), note))
    balance = await tried.balance(COST)
    assert (balance.spent, balance.reserved) == (350, 0)
    await store.settle_once(WorkItem("other", "3.0"), Settlement(third, (60,), None))
    assert (await tried.balance(COST)).spent == 410
    assert await store.counts(["usage/work"]) == [{"requests": 2}]
