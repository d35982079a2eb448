"""The contract of volatile stores, tested with memory and Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import count

import pytest
import pytest_asyncio
from redis import Redis

from service.errors import StoreUnavailableError
from service.store.api_keys import KeyRecord, KeyService, StoreKeyRepository
from service.store.limit_windows import DAY
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import Account, Charge, Granted, StoreClaim
from service.store.volatile_redis_store import RedisVolatileStore
from service.store.volatile_store import MemoryVolatileStore, VolatileStore
from tests.support.redis_server import RedisServer, redis_server

_ids = count()
_MIB = 1024**2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest_asyncio.fixture(params=["memory", "redis"])
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[VolatileStore]:
    if request.param == "memory":
        yield MemoryVolatileStore(_MIB)
        return
    server: RedisServer = request.getfixturevalue("server")
    store = RedisVolatileStore(server.url, prefix=f"t{next(_ids)}", timeout_s=5)
    yield store
    await store.close()


async def test_volatile_store_values_expire(kept: VolatileStore) -> None:
    assert await kept.get("a/b") is None
    await kept.put("a/b", b"\x00one", ttl_s=60)
    await kept.put("a/b", b"\x00two", ttl_s=60)
    await kept.put("short", b"x", ttl_s=0.02)
    assert await kept.get("a/b") == b"\x00two"
    await asyncio.sleep(0.05)
    assert await kept.get("short") is None


async def test_volatile_store_deleted_value_is_gone(kept: VolatileStore) -> None:
    await kept.put("x", b"1", ttl_s=60)
    await kept.put("y", b"2", ttl_s=60)
    await kept.delete("x")
    await kept.delete("x")
    assert [await kept.get(name) for name in ("x", "y")] == [None, b"2"]


async def test_volatile_store_concurrent_adds_have_one_winner(kept: VolatileStore) -> None:
    first = await asyncio.gather(*(kept.add("v", b"1", ttl_s=60) for _ in range(10)))
    assert sorted(first) == [False] * 9 + [True]
    assert await kept.add("w", b"1", ttl_s=0.02)
    await asyncio.sleep(0.05)
    assert await kept.add("w", b"1", ttl_s=60)


async def test_volatile_store_memory_evicts_least_recently_used_within_its_bytes() -> None:
    kept = MemoryVolatileStore(10_000)
    for i in range(1000):
        await kept.put(f"n{i}", bytes(500), ttl_s=60)
        assert kept.size_bytes <= 10_000
        assert i == 0 or await kept.get("n0") is not None
    assert await kept.get("n999") is not None
    assert await kept.get("n500") is None
    await kept.put("huge", bytes(20_000), ttl_s=60)
    assert await kept.get("huge") is None
    assert kept.size_bytes == 0


async def test_volatile_store_evictions_do_not_affect_the_durable_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Two Redis of little memory: the one for what may be lost is filled several times over."""
    with (
        redis_server(tmp_path_factory.mktemp("counts")) as counting,
        redis_server(tmp_path_factory.mktemp("volatile")) as losing,
    ):
        for server, policy in ((counting, "noeviction"), (losing, "allkeys-lru")):
            with server.client() as client:
                client.config_set("maxmemory", _used(client) + 4 * _MIB)
                client.config_set("maxmemory-policy", policy)
        client_ = RedisClient(counting.url, "me", prefix="coe", timeout_s=5, lease_s=30)
        store = RedisStore(client_, share=0, lease_s=30)
        volatile = RedisVolatileStore(losing.url, prefix="coe", timeout_s=5)
        await store.start()
        keys = KeyService(StoreKeyRepository(store))
        made, _ = await keys.create(KeyRecord("", "acme", ""), 1.0)
        budget = Account("budget/all", 10**9, DAY)
        for i in range(400):
            await volatile.put(f"cache/acme/answer/{i}", bytes(65_536), ttl_s=3600)
            if i % 40 == 0:
                got = await store.reserve(StoreClaim(f"c{i}", (Charge(budget, 7),)))
                assert isinstance(got, Granted)
                await store.settle(got, [7], None)
        assert (await store.balances([budget]))[0].spent == 70
        assert (await keys.revoke(made.id, 2.0)).revoked_s == 2.0
        with losing.client() as client:
            assert client.info("stats")["evicted_keys"] > 200
        with counting.client() as client:
            assert not [name for name in client.keys("*") if ":v:" in str(name)]
        await volatile.close()
        await store.stop()


async def test_redis_volatile_store_unavailable_fails_without_waiting(server: RedisServer) -> None:
    gone = RedisVolatileStore("redis://127.0.0.1:1/0", prefix="x", timeout_s=5)
    for _ in range(3):
        with pytest.raises(StoreUnavailableError, match="volatile store can't be reached"):
            await gone.get("a")
    assert gone._paused_until_s > 0
    await gone.close()


def _used(client: Redis) -> int:
    return int(client.info("memory")["used_memory"])


async def test_key_revoked_during_rotations_stays_revoked(server: RedisServer) -> None:
    """Two gateways, and somebody who rotates a key while another one revokes it."""
    stores = []
    for _ in range(2):
        owner = f"o{next(_ids)}"
        client = RedisClient(server.url, owner, prefix="race", timeout_s=5, lease_s=30)
        store = RedisStore(client, share=0, lease_s=30)
        await store.start()
        stores.append(store)
    one, other = (KeyService(StoreKeyRepository(store)) for store in stores)
    wanted = KeyRecord("", "acme", "")
    for _ in range(30):
        made, _ = await one.create(replace(wanted), 1.0)
        await asyncio.gather(
            one.rotate(made.id, 2.0, 60.0), other.revoke(made.id, 2.0), return_exceptions=True
        )
        after = {record.id: record for record in await one.records()}[made.id]
        assert after.state(3.0) == "revoked"
    for store in stores:
        await store.stop()
