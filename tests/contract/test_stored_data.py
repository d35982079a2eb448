"""Data written by earlier versions is read: API keys, budgets, usage, key files, router artifacts.

`tests/data/stored_*.json` holds what the service of that day had in Redis and in its file of keys,
written by its own code; the keys in it were made for this and are worth nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from redis import Redis

from service.classifier.classifier import Classifier
from service.classifier.router_artifact import load_artifact
from service.store.api_keys import FileKeyRepository, KeyRepository, KeyTable, StoreKeyRepository
from service.store.limit_windows import DAY, MONTH
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from service.store.store_interface import Account
from tests.support.redis_server import RedisServer, redis_server

ROOT = Path(__file__).parents[2]
AT_S = 1_700_000_000.5
WRITTEN = sorted((ROOT / "tests" / "data").glob("stored_*.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=WRITTEN, ids=lambda path: path.stem)
def written(request: pytest.FixtureRequest, server: RedisServer) -> dict[str, Any]:
    """What was written, put into Redis as it stood there."""
    data: dict[str, Any] = json.loads(request.param.read_text())
    with Redis.from_url(server.url) as redis:
        redis.flushall()
        for name, kind, value in data["redis"]:
            if kind == "hash":
                redis.hset(name, mapping={k: base64.b64decode(v) for k, v in value.items()})
            else:
                assert kind == "string", f"{name}: this test must learn to write a {kind}"
                redis.set(name, base64.b64decode(value))
    return data


@pytest_asyncio.fixture
async def store(written: dict[str, Any], server: RedisServer) -> AsyncIterator[RedisStore]:
    client = RedisClient(
        server.url, "reader", prefix="coe", timeout_s=5, lease_s=10**6, clock=lambda: AT_S
    )
    opened = RedisStore(client, share=0, lease_s=10**6, heartbeat_s=0.02)
    await opened.start()
    yield opened
    await opened.stop()


async def found_tenant(book: KeyRepository, key: str) -> str | None:
    record = KeyTable(await book.load()).find(key, AT_S)
    return record.tenant if record is not None else None


async def test_api_keys_written_to_redis_by_earlier_versions_are_accepted(
    store: RedisStore, written: dict[str, Any]
) -> None:
    book = StoreKeyRepository(store)
    assert await book.version() is not None
    assert await found_tenant(book, written["key"]) == "acme"


async def test_api_keys_written_to_redis_by_earlier_versions_stay_readable_for_them(
    store: RedisStore, written: dict[str, Any], server: RedisServer
) -> None:
    await StoreKeyRepository(store).load()
    with Redis.from_url(server.url) as redis:
        left = {name.decode() for name in redis.scan_iter("*")}
    assert {name for name, _, _ in written["redis"]} <= left


async def test_budgets_and_usage_written_by_earlier_versions_count(
    store: RedisStore, written: dict[str, Any]
) -> None:
    accounts = [
        Account("tenants/acme/budget", 1000, DAY),
        Account("budgets/everybody", 10**9, MONTH),
    ]
    assert [balance.spent for balance in await store.balances(accounts)] == [17, 17]
    assert await store.counts(["usage/acme/19675"]) == [{"requests": 1, "tokens": 42}]


async def test_keys_file_written_by_earlier_versions_is_read(
    written: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text(written["keys_file"])
    book = FileKeyRepository(path)
    assert await found_tenant(book, written["file_key"]) == "acme"
    assert sorted(item.state(AT_S + 2) for item in await book.load()) == ["active", "revoked"]


def test_artifact_written_by_earlier_versions_is_read() -> None:
    artifact = load_artifact(ROOT / "router_models" / "artifacts" / "demo@1")
    assert Classifier.from_artifact(artifact).classify("What is 2 + 2?").category == "math"
