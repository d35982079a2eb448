"""Gateways, and Redis, are killed while batches run: each line is answered and charged once."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from service.broker.limit_and_budget_ledger import Ledger
from service.store.redis_commands import RedisClient
from service.store.redis_store import RedisStore
from tests.integration.test_batches import (
    client,
    completed,
    config,
    create,
    ended,
    line,
    read,
    upload,
)
from tests.support.polling import until
from tests.support.redis_server import RedisServer, redis_server

LINES = 40
KILLS = 4


class At:
    """Where a gateway is, for the helpers that take a running one."""

    def __init__(self, url: str) -> None:
        self.url = url


@contextmanager
def gateway(path: Path) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A gateway in a process of its own, killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.batch_gateway_process", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http"), url
        yield process, At(url)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


async def test_killed_gateways_and_redis_lose_and_double_no_line(tmp_path: Path) -> None:
    rng = random.Random(1)
    with redis_server(tmp_path / "redis", more=["--appendfsync", "always"]) as server:
        given = config(
            tmp_path,
            store={"kind": "redis", "url": server.url, "lease_s": 2},
            budgets={"all": {"amount": 1000, "period": "month"}},
            experts={"general": {"model": "m", "price": {"prompt": 100, "completion": 200}}},
            pool={"tokens": 4, "decode_ms": 10},
            batches={"max_in_flight": 4, "lease_s": 1},
        )
        path = tmp_path / "config.json"
        path.write_text(given.model_dump_json())
        batch_id = ""
        for kill in range(KILLS):
            with gateway(path) as (process, at):
                async with client(at).with_options(max_retries=8) as api:
                    if not batch_id:
                        file = await upload(api, *(line(i) for i in range(LINES)))
                        batch_id = (await create(api, file.id)).id
                    wanted = await completed(api, batch_id) + rng.randint(1, 3)

                    await until(partial(_reached, api, batch_id, wanted), "more lines are answered")
                    if kill == 2:
                        server.kill()
                        server.start()
                process.kill()
        with gateway(path) as (_, at):
            async with client(at).with_options(max_retries=8) as api:
                batch = await ended(api, batch_id)
                assert batch.status == "completed"
                lines = await read(api, batch.output_file_id)
        assert [each["custom_id"] for each in lines] == [f"c{i}" for i in range(LINES)]
        cost = sum(each["response"]["body"]["usage"]["coe"]["cost"] for each in lines)
        spent = await _spent(server, given)
        assert spent == pytest.approx(cost, abs=1e-9)
        with server.client() as redis:
            (day,) = redis.keys("{coe}:n:usage/default/*")
            assert redis.hget(day, "requests") == str(LINES)


async def _reached(api: openai.AsyncOpenAI, batch_id: str, wanted: int) -> bool:
    return await completed(api, batch_id) >= wanted


async def _spent(server: RedisServer, given: Any) -> float:
    store = RedisStore(
        RedisClient(server.url, "looking", prefix="coe", timeout_s=5, lease_s=5), share=0, lease_s=5
    )
    await store.start()
    state = (await Ledger(given, store).state())["all"]
    await store.stop()
    return state.spent
