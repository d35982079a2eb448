"""Circuit breakers open on an endpoint's own failures and never on a client's."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest

from service.config import Config
from tests.support.in_process_service import RunningGateway, chat, run_gateway, serving
from tests.support.polling import until


@dataclass
class Upstream:
    """An OpenAI endpoint that does as it is told."""

    manner: str = "well"
    asked: int = 0
    seen: list[str] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        if self.manner == "hangs":
            # Until whoever asked leaves.
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        status, body = 200, orjson.dumps({"model": "m", "choices": [], "usage": {}})
        if self.manner.isdigit():
            status, body = int(self.manner), orjson.dumps({"error": {"message": "no"}})
        elif self.manner == "garbage":
            body = b"<html>"
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def running(**breaker: Any) -> AsyncIterator[tuple[RunningGateway, Upstream]]:
    upstream = Upstream()
    async with serving(upstream) as served:
        remote = {"url": served.url, "model": "m"}
        config = {
            "server": {"breaker": {"failures": 1, "open_duration_s": 60, **breaker}},
            "experts": {
                "general": {"model": "m", "categories": ["general"]},
                "far": {"remote": remote, "categories": ["other"]},
                "beside": {"remote": remote},
            },
            "pools": {"cpu": {"engine": "simulated", "experts": ["general"]}},
        }
        async with run_gateway(Config.model_validate(config)) as made:
            yield made, upstream


async def far(s: RunningGateway, **more: Any) -> tuple[int, str]:
    status, _, body = await s.ask(chat(model="far"), **more)
    return status, body["error"]["code"] if status >= 400 else body["model"]


async def open_breakers(s: RunningGateway) -> float:
    async with s.get("/metrics") as reply:
        text = await reply.text()
    return sum(map(float, re.findall(r'^coe_breaker_open\{.*expert="far".*\} (\S+)', text, re.M)))


@pytest.mark.parametrize("manner", ["400", "401", "404", "422", "429"])
async def test_breaker_ignores_4xx(manner: str) -> None:
    async with running() as (s, upstream):
        upstream.manner = manner
        for _ in range(10):
            status, _ = await far(s)
            assert status in (int(manner), 502, 503)
        assert upstream.asked == 10
        assert await open_breakers(s) == 0
        upstream.manner = "well"
        assert await far(s) == (200, "far")


async def test_breaker_ignores_client_deadlines_and_disconnects() -> None:
    async with running() as (s, upstream):
        upstream.manner = "hangs"
        for _ in range(3):
            status, code = await far(s, headers={"x-coe-deadline-ms": "50"})
            assert (status, code) == (504, "deadline_exceeded")
        leaving = asyncio.create_task(far(s))
        await until(lambda: upstream.asked == 4, "the fourth is there")
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        upstream.manner = "well"
        assert await far(s) == (200, "far")
        assert await open_breakers(s) == 0


@pytest.mark.parametrize(("manner", "first"), [("garbage", 502), ("500", 502), ("503", 503)])
async def test_breaker_opens_after_failures_and_others_answer(manner: str, first: int) -> None:
    async with running() as (s, upstream):
        upstream.manner = manner
        assert await far(s) == (first, "upstream_error")
        before = upstream.asked
        status, headers, body = await s.ask(chat(model="far"))
        assert (status, body["error"]["code"]) == (503, "circuit_open")
        assert 1 <= int(headers["retry-after"]) <= 80
        # Along the map: nobody waits for the one that is left alone.
        status, _, body = await s.ask(chat(model="auto/other"))
        assert (status, body["model"]) == (200, "general")
        assert upstream.asked == before
        assert await open_breakers(s) == 1
        # Another model at the same endpoint is another matter: it was reached.
        upstream.manner = "well"
        status, _, body = await s.ask(chat(model="beside"))
        assert (status, body["model"]) == (200, "beside")


async def test_breaker_opens_after_silent_streams() -> None:
    async with running(min_hang_s=0.1) as (s, upstream):
        upstream.manner = "hangs"
        for expected in ("deadline_exceeded", "circuit_open"):
            async with s.post(
                chat(model="far", stream=True), headers={"x-coe-deadline-ms": "200"}
            ) as reply:
                assert (await reply.json())["error"]["code"] == expected


async def test_breaker_closes_after_one_probe() -> None:
    async with running(open_duration_s=0.2) as (s, upstream):
        upstream.manner = "garbage"
        await far(s)
        upstream.manner = "well"
        assert await far(s) == (503, "circuit_open")

        async def answered() -> bool:
            return (await far(s))[0] == 200

        await until(answered, "a probe was let through")
        assert await far(s) == (200, "far")
        assert await open_breakers(s) == 0


async def test_breaker_of_a_dead_endpoint_opens_for_all_its_experts() -> None:
    async with running() as (s, _):
        for link in s.gateway.remote_pools.values():
            link.engine._base = "http://127.0.0.1:9"  # type: ignore[attr-defined]
        assert (await far(s))[1] == "upstream_error"
        status, _, body = await s.ask(chat(model="beside"))
        assert (status, body["error"]["code"]) == (503, "circuit_open")


async def test_retries_are_limited_by_the_retry_budget() -> None:
    async with running(failures=10_000, retry_budget_ratio=0, retry_budget_min=3) as (s, upstream):
        upstream.manner = "500"
        models = []
        for _ in range(5):
            status, _, body = await s.ask(chat(model="auto/other"))
            models.append(body["model"] if status == 200 else body["error"]["code"])
        assert models == ["general"] * 3 + ["upstream_error"] * 2
