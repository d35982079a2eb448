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
from tests.support.in_process_service import (
    RunningGateway,
    chat,
    run_gateway,
    serving,
    simulated,
)
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
        if self.manner.startswith("{"):
            # A stream that breaks by an event.
            headers = [(b"content-type", b"text/event-stream")]
            chunk = orjson.dumps({"model": "m", "choices": [{"index": 0, "delta": {}}]})
            body = b"data: " + chunk + b"\n\ndata: " + self.manner.encode() + b"\n\n"
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
        asked = upstream.asked
        leaving = asyncio.create_task(far(s))
        await until(lambda: upstream.asked == asked + 1, "one more is there")
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
                chat(model="far", stream=True), headers={"x-coe-deadline-ms": "1000"}
            ) as reply:
                assert (await reply.json())["error"]["code"] == expected


@pytest.mark.parametrize(
    ("error", "opens"),
    [
        ({"message": "no", "type": "server_error", "code": "engine_dead"}, True),
        ({"message": "no", "type": "api_error"}, True),
        ({"message": "no", "type": "InternalServerError", "code": 500}, True),
        ({"message": "no"}, True),
        ({"message": "no", "type": "BadRequestError", "code": 400}, False),
        ({"message": "no", "type": "rate_limit_error"}, False),
        ({"message": "no", "code": 429}, False),
        ({"message": "no", "type": "overloaded_error"}, False),
        ({"message": "no", "code": "context_length_exceeded"}, False),
    ],
)
async def test_breaker_counts_errors_inside_streams_by_whose_fault_they_are(
    error: dict[str, Any], opens: bool
) -> None:
    async with running() as (s, upstream):
        upstream.manner = orjson.dumps({"error": error}).decode()
        async with s.post(chat(model="far", stream=True)) as reply:
            assert reply.status == 200
            assert b'"error"' in await reply.read()
        assert await open_breakers(s) == float(opens)
        # The endpoint was reached: another model there is another matter.
        upstream.manner = "well"
        assert (await s.ask(chat(model="beside")))[0] == 200


async def test_breaker_of_a_pool_opens_after_engines_that_die_in_a_stream() -> None:
    config = simulated(
        {"cpu": {"fail": "mid_stream", "tokens": 4}},
        server={"breaker": {"failures": 1, "open_duration_s": 60}},
    )
    async with run_gateway(config) as s:
        async with s.post(chat(stream=True)) as reply:
            assert b'"engine_dead"' in await reply.read()
        async with s.get("/metrics") as reply:
            text = await reply.text()
        assert re.search(r'^coe_breaker_open\{.*expert="general".*\} 1', text, re.M), text


async def test_breaker_closes_after_one_probe() -> None:
    async with running() as (s, upstream):
        upstream.manner = "garbage"
        await far(s)
        upstream.manner = "well"
        assert await far(s) == (503, "circuit_open")
        for breaker in s.gateway.state.breakers._all.values():
            breaker._until_s = asyncio.get_running_loop().time()  # its time has passed

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
