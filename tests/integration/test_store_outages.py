"""The shared store on a real Redis: bursts, killed gateways, and Redis stopped, hung or emptied."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from service.errors import StoreUnavailableError
from service.store.limit_windows import DAY, MINUTE, NOW
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import Account, Charge, Granted, Refused, StoreClaim, UsageNote
from tests.support.polling import until
from tests.support.redis_server import RedisServer, redis_server

_ids = count()
BUDGET = Account("budget/all", 10_000, DAY)
REQUESTS = Account("key/k/requests", 500, MINUTE)
AT_ONCE = Account("key/k/concurrent", 100, NOW)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as running:
        yield running


def made(
    server: RedisServer,
    owner: str,
    *,
    share: float = 0.1,
    lease_s: float = 30,
    timeout_s: float = 10,
) -> RedisStore:
    client = RedisClient(server.url, owner, prefix="coe", timeout_s=timeout_s, lease_s=lease_s)
    return RedisStore(client, share=share, lease_s=lease_s, heartbeat_s=0.05)


@asynccontextmanager
async def gateways(
    server: RedisServer, n: int = 2, **settings: float
) -> AsyncIterator[list[RedisStore]]:
    async with AsyncExitStack() as stack:
        stores = []
        for i in range(n):
            store = made(server, f"g{i}", **settings)
            await store.start()
            stack.push_async_callback(store.stop)
            stores.append(store)
        yield stores


def claim(*lines: Charge) -> StoreClaim:
    return StoreClaim(f"c{next(_ids)}", lines or (Charge(BUDGET, 100), Charge(REQUESTS, 1)))


async def granted(store: RedisStore, *lines: Charge) -> Granted:
    got = await store.reserve(claim(*lines))
    assert isinstance(got, Granted)
    return got


async def amounts(store: RedisStore, account: Account) -> tuple[int, int]:
    (balance,) = await store.balances([account])
    return balance.spent, balance.reserved


async def holds_quota(store: RedisStore, server: RedisServer) -> None:
    """Wait until the store holds an offline quota of the budget."""

    def held() -> bool:
        one = store._quotas._quotas.get(BUDGET.name)
        return one is not None and one.held > 0 and one.room > 0

    await until(held, "a quota is granted")


async def test_burst_through_two_gateways_takes_exactly_the_limits(server: RedisServer) -> None:
    async with gateways(server) as stores:
        served = 0

        async def use(store: RedisStore) -> bool:
            """Whether the budget is spent, or else one more served where there is room."""
            nonlocal served
            got = await store.reserve(claim(Charge(BUDGET, 40), Charge(REQUESTS, 1)))
            if isinstance(got, Granted):
                await store.settle(got, [40, 1], None)
                served += 1
                return False
            return not got.busy

        async def client(i: int) -> None:
            for _ in range(4):
                await use(stores[i % 2])

        await asyncio.gather(*(client(i) for i in range(64)))
        # Quotas are given back once a claim was refused.
        await until(lambda: use(stores[0]), "the budget is spent")
        assert served == 250  # 10,000 / 40
        assert await amounts(stores[1], BUDGET) == (10_000, 0)
        spent, reserved = await amounts(stores[1], REQUESTS)
        assert spent == 250
        assert reserved <= 2 * 25  # quotas only


async def test_killed_gateway_leaks_no_reservation(server: RedisServer) -> None:
    async with gateways(server, 1, share=0) as (living,):
        killed = made(server, "killed", share=0, lease_s=2)
        await killed._heartbeat()
        lines = (Charge(BUDGET, 7000), Charge(AT_ONCE, 90))
        held = await granted(killed, *lines)
        assert isinstance(await living.reserve(claim(*lines)), Refused)
        assert await amounts(living, BUDGET) == (0, 7000)

        async def free() -> bool:
            return await amounts(living, BUDGET) == (0, 0)

        await until(free, "the dead one's reservations are free")
        assert await amounts(living, AT_ONCE) == (0, 0)
        # It was not dead after all: what it used is charged, once.
        for _ in range(2):
            killed._granted[held.claim.id] = held
            await killed.settle(held, [5000, 0], None)
        assert await amounts(living, BUDGET) == (5000, 0)
        await killed._client.close()


async def test_redis_outage_offline_claims_are_settled_afterwards(server: RedisServer) -> None:
    async with gateways(server) as stores:
        used = 0
        before = [await granted(store) for store in stores]
        for store in stores:
            await holds_quota(store, server)
        server.kill()
        offline: list[tuple[RedisStore, Granted]] = []

        async def spend(store: RedisStore) -> None:
            while True:
                offline.append((store, await granted(store)))

        for store in stores:
            with pytest.raises(StoreUnavailableError) as caught:
                await spend(store)
            assert caught.value.retry_after_s >= 1
            assert "used up" in caught.value.message
            with pytest.raises(StoreUnavailableError):
                await store.version("x")
        # A tenth of what was left, each: more than nothing, and together never too much.
        assert 2 <= len(offline) <= 20
        assert all(got.offline for _, got in offline)
        for store, got in offline[::2]:
            await store.settle(got, [30, 1], UsageNote("u", {"requests": 1}, 100))
            used += 30
        for store, got in zip(stores, before, strict=True):
            await store.settle(got, [55, 1], None)
            used += 55
        server.start()
        for store in stores:
            await until(lambda store=store: store.up, "it is back")
        for store, got in offline[1::2]:
            await store.settle(got, [30, 1], UsageNote("u", {"requests": 1}, 100))
            used += 30

        async def told() -> bool:
            spent, _ = await amounts(stores[0], BUDGET)
            return spent == used and not any(store.health().pending_settlements for store in stores)

        await until(told, "what was used is told")
        assert await stores[0].counts(["u"]) == [{"requests": len(offline)}]
        assert (await amounts(stores[0], REQUESTS))[0] == len(offline) + 2
        for store in stores:
            store._quotas.share = 0
            store._quotas._quotas[BUDGET.name].room = 0

        async def nothing_held() -> bool:
            return (await amounts(stores[0], BUDGET))[1] == 0

        await until(nothing_held, "no reservation is left")
        assert [store.outages for store in stores] == [1, 1]


async def test_redis_hang_claims_are_granted_from_the_quota(server: RedisServer) -> None:
    async with gateways(server, 1, timeout_s=1) as (store,):
        got = await granted(store)
        await holds_quota(store, server)
        server.hang()
        try:
            # Asked while nobody knows yet: answered from the quota, after the timeout.
            offline = await granted(store)
            assert offline.offline
            assert not store.up
            await store.settle(got, [10, 1], None)
            await store.settle(offline, [20, 1], None)
        finally:
            server.go_on()
        await until(
            lambda: store.up and not store.health().pending_settlements, "it is back and told"
        )
        # The claim that Redis heard of but could not answer came to nothing.
        assert server.client().hlen("{coe}:own:g0") == 0
        assert (await amounts(store, BUDGET))[0] == 30


async def test_redis_that_lost_its_data_is_told_of_open_claims(server: RedisServer) -> None:
    async with gateways(server, 1, share=0) as (store,):
        got = await granted(store)
        server.client().flushall()

        async def known() -> bool:
            return await amounts(store, BUDGET) == (0, 100)

        await until(known, "what is under way is reserved anew")
        await store.settle(got, [60, 1], None)
        assert await amounts(store, BUDGET) == (60, 0)


async def test_redis_outage_beyond_the_lease_ends_quotas_and_frees_nothing(
    server: RedisServer,
) -> None:
    async with gateways(server, 1, share=0.1, lease_s=0.5) as (store,):
        got = await granted(store)
        await holds_quota(store, server)
        server.kill()

        async def refused() -> bool:
            try:
                await store.reserve(claim(Charge(BUDGET, 1)))
            except StoreUnavailableError:
                return True
            return False

        await until(refused, "the lease has ended")
        assert store._quotas._quotas[BUDGET.name].held > 50
        server.start()
        await until(lambda: store.up, "it is back")
        await store.settle(got, [100, 1], None)
        spent, _ = await amounts(store, BUDGET)
        assert spent >= 100


async def test_ledger_survives_a_restart_of_gateways_and_redis(server: RedisServer) -> None:
    async with gateways(server, 1) as (store,):
        got = await granted(store)
        await store.settle(got, [77, 1], UsageNote("u", {"cost": 77}, 1000))
        assert await store.replace("keys", "1", None, b"kept")
    server.kill()
    server.start()
    async with gateways(server, 1) as (store,):
        assert await amounts(store, BUDGET) == (77, 0)
        assert await store.counts(["u"]) == [{"cost": 77}]
        assert await store.records("keys") == {"1": b"kept"}


async def test_without_redis_at_the_start_limited_claims_raise(server: RedisServer) -> None:
    server.kill()
    async with gateways(server, 1) as (store,):
        with pytest.raises(StoreUnavailableError):
            await store.reserve(claim())
        # What nothing bounds needs no store.
        assert isinstance(await store.reserve(StoreClaim("free", ())), Granted)
        server.start()
        await until(lambda: store.up, "it is there now")
        await granted(store)
