"""Errors of a Redis that answers but refuses, told apart from one that can't be reached."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError, ResponseError

from service.errors import StoreUnavailableError
from service.store.api_keys import KeyRecord, KeyService, StoreKeyRepository
from service.store.limit_windows import DAY
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import Account, Charge, Granted, StoreClaim, UsageNote
from service.store.volatile_redis_store import RedisVolatileStore
from tests.support.redis_server import RedisServer, redis_server

PASSWORD = "p@ss#w/rd%:é"
BUDGET = Account("budget/all", 100, DAY)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def store_at(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(
        RedisClient(url, "me", prefix="coe", timeout_s=2, lease_s=30), share=0, lease_s=30
    )
    await store.start()
    try:
        yield store
    finally:
        await store.stop()


async def refused(url: str) -> set[str]:
    """What each operation says, which has to be a refusal."""
    answers = set()
    async with store_at(url) as store:
        for ask in (
            lambda: store.records("keys"),
            lambda: store.replace("keys", "a", None, b""),
            lambda: store.reserve(StoreClaim("c", (Charge(BUDGET, 1),))),
        ):
            with pytest.raises(StoreUnavailableError) as caught:
                await ask()
            answers.add(caught.value.message)
    return answers


async def test_redis_user_with_an_awkward_password_connects_and_a_wrong_one_raises(
    server: RedisServer,
) -> None:
    with server.client() as client:
        client.acl_setuser(
            "coe", enabled=True, passwords=[f"+{PASSWORD}"], keys=["*"], categories=["+@all"]
        )
    where = f"127.0.0.1:{server.port}/3"
    async with store_at(f"redis://coe:{quote(PASSWORD, safe='')}@{where}") as store:
        keys = KeyService(StoreKeyRepository(store))
        made, _ = await keys.create(KeyRecord("", "acme", ""), 1.0)
        assert [record.id for record in await keys.records()] == [made.id]
    for who in ("coe:wrong-hunter2", "nobody:wrong-hunter2"):
        for text in await refused(f"redis://{who}@{where}"):
            assert "authentication" in text
            assert "password" in text
            assert "hunter2" not in text
            assert "gone" not in text


async def test_redis_url_without_the_needed_password_raises(server: RedisServer) -> None:
    with server.client() as client:
        client.config_set("requirepass", "secret")
    assert all("authentication" in text for text in await refused(server.url))


async def test_redis_user_without_script_permission_raises(server: RedisServer) -> None:
    with server.client() as client:
        client.acl_setuser(
            "coe", enabled=True, passwords=["+x"], keys=["*"], categories=["+@read", "+@connection"]
        )
    errors = await refused(f"redis://coe:x@127.0.0.1:{server.port}/0")
    assert all("permission" in text for text in errors)


@pytest.mark.parametrize("place", ["deploy/compose.yaml", "helm/charts/redis/templates/redis.yaml"])
async def test_redis_user_of_the_deployments_has_the_needed_permissions_only(
    server: RedisServer, place: str
) -> None:
    text = (Path(__file__).parents[2] / place).read_text()
    rules = re.search(r'user default on ">\$.*?" (~\S.*)', text)
    assert rules is not None
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "coe", "on", ">x", *rules[1].split())
    url = f"redis://coe:x@127.0.0.1:{server.port}/0"
    async with store_at(url) as store:
        keys = KeyService(StoreKeyRepository(store))
        made, _ = await keys.create(KeyRecord("", "acme", ""), 1.0)
        await keys.revoke(made.id, 2.0)
        got = await store.reserve(StoreClaim("c", (Charge(BUDGET, 1),)))
        assert isinstance(got, Granted)
        await store.settle(got, [1], UsageNote("n", {"requests": 1}, 100))
        assert await store.counts(["n"]) == [{"requests": 1}]
        assert (await store.balances([BUDGET]))[0].spent == 1
    volatile = RedisVolatileStore(url, prefix="coe", timeout_s=2)
    assert await volatile.add("a", b"1", ttl_s=9)
    await volatile.put("b", b"2", ttl_s=9)
    assert await volatile.get("b") == b"2"
    await volatile.close()
    with Redis.from_url(url) as client:
        # What Ray's head asks where it keeps its state there.
        client.info("sentinel")
        client.hset("h", "f", "v")
        assert client.hmget("h", ["f"]) == [b"v"]
        assert client.hscan("h")[1] == {b"f": b"v"}
        client.scan()
        assert client.unlink("h") == 1
        with pytest.raises(ResponseError, match="cluster support disabled"):
            client.execute_command("CLUSTER", "INFO")
        for command in (
            ("FLUSHALL",),
            ("FLUSHDB",),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("SHUTDOWN",),
            ("ACL", "LIST"),
            ("REPLICAOF", "NO", "ONE"),
        ):
            with pytest.raises(NoPermissionError):
                client.execute_command(*command)


async def test_redis_read_only_replica_or_full_store_raises(server: RedisServer) -> None:
    with server.client() as client:
        client.config_set("maxmemory", 1)
        assert any("full" in text for text in await refused(server.url))
        client.config_set("maxmemory", 0)
        client.replicaof("127.0.0.1", "1")
        errors = await refused(server.url)
        assert all("read-only" in text for text in errors)


async def test_redis_cluster_node_raises(tmp_path_factory: pytest.TempPathFactory) -> None:
    server = RedisServer(tmp_path_factory.mktemp("node"), 21_379)
    server.more = ["--cluster-enabled", "yes"]
    server.start()
    try:
        with server.client() as client:
            # Half of the slots: the cluster is down.
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
        assert all("cluster" in text for text in await refused(server.url))
    finally:
        server.kill()
