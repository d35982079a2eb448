"""The console's files and its event stream over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from service.config import Config
from service.gateway.console import event_stream as feeds
from service.gpu_devices import GpuMemory
from tests.integration import test_batches as batches
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, chat, run_gateway, simulated

TWO = simulated(
    {"cpu": {"tokens": 6}},
    experts={
        "general": {"model": "m", "categories": ["general"], "description": "anything"},
        "math": {"model": "m", "categories": ["math"]},
    },
)


async def events(reply: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    name = ""
    async for line in reply.content:
        if line.startswith(b"event: "):
            name = line[7:].strip().decode()
        elif line.startswith(b"data: "):
            yield name, json.loads(line[6:])


async def first(received: AsyncIterator[tuple[str, Any]], name: str) -> Any:
    """The next event of that name."""
    async for got, data in received:
        if got == name:
            return data
    raise AssertionError(f"the stream ended without {name}")


async def test_console_pages_have_a_strict_policy_and_are_cached() -> None:
    async with run_gateway(TWO) as s:
        for path in ("/console", "/docs"):
            async with s.get(path) as reply:
                assert reply.status == 200
                assert reply.headers["content-type"].startswith("text/html")
                policy = reply.headers["content-security-policy"]
                assert "unsafe" not in policy
                assert "default-src 'none'" in policy
                etag = reply.headers["etag"]
            async with s.client.get(s.url + path, headers={"if-none-match": etag}) as reply:
                assert (reply.status, await reply.read()) == (304, b"")
        async with s.client.get(s.url + "/", allow_redirects=False) as reply:
            assert (reply.status, reply.headers["location"]) == (307, "/console")
        async with s.get("/console/vendor/uplot-LICENSE.txt") as reply:
            assert "MIT License" in await reply.text()
        for path in ("/console/nothing.js", "/console/../app.py", "/console/%2e%2e/feed.py"):
            async with s.get(path) as reply:
                assert reply.status == 404


async def test_events_report_experts_then_each_request_and_its_tokens() -> None:
    async with run_gateway(TWO) as s, s.get("/console/events") as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        received = events(reply)
        hello = await first(received, "hello")
        assert [expert["name"] for expert in hello["experts"]] == ["general", "math"]
        assert hello["experts"][0]["kind"] == "full"
        (pool,) = hello["state"]["pools"]
        assert pool["experts"]["math"]["state"] == "device"
        status, headers, _ = await s.ask(chat("my private words", model="auto"))
        assert status == 200
        (route,) = (await first(received, "routes"))["routes"]
        assert route["request"] == headers["x-request-id"]
        assert (route["asked"], route["expert"], route["outcome"]) == ("auto", "general", "ok")
        assert route["first_ms"] > 0
        state = await first(received, "state")
        while state["pools"][0]["experts"]["general"].get("tokens", 0) < 6:
            state = await first(received, "state")
        assert state["flows"] == [
            {"category": "general", "recipe": "general", "expert": "general", "count": 1}
        ]
        assert state["totals"]["requests"] == 1
        assert "private" not in json.dumps([route, state])


async def test_events_count_the_batches_of_all_tenants_and_name_none(tmp_path: Path) -> None:
    given = TWO.model_dump(mode="json", exclude_defaults=True)
    given["pools"]["cpu"]["simulated"] = {"decode_ms": 100, "max_model_len": 4096}
    given["batches"] = {"folder": str(tmp_path / "batches"), "lease_s": 1}
    async with (
        run_gateway(Config.model_validate(given)) as s,
        batches.client(s) as api,
        s.get("/console/events") as reply,
    ):
        received = events(reply)
        state = (await first(received, "hello"))["state"]
        assert state["batches"] == {"states": {}, "lines": 0}
        # An answer of 2,000 tokens takes minutes.
        file = await batches.upload(
            api, batches.line(0, max_tokens=1), batches.line(1, max_tokens=2000)
        )
        made = await batches.create(api, file.id)
        while state["batches"] != {"states": {"in_progress": 1}, "lines": 1}:
            state = await first(received, "state")
        assert made.id not in json.dumps(state)
        await api.batches.cancel(made.id)
        while state["batches"]["states"]:
            state = await first(received, "state")
        assert (await batches.ended(api, made.id)).status == "cancelled"


async def test_events_and_metrics_have_the_memory_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GpuMemory(4, "GPU-4", "H200", 140 << 30, 60 << 30, 79 << 30)
    monkeypatch.setattr("service.pool.pool_process.gpu_memory", lambda: (memory,))
    given = TWO.model_dump(mode="json", exclude_defaults=True)
    given["pools"]["cpu"]["gpus"] = 1
    async with (
        run_gateway(Config.model_validate(given)) as s,
        s.get("/console/events") as reply,
    ):
        received = events(reply)
        state = (await first(received, "hello"))["state"]
        while not state["pools"][0]["gpus"]:
            state = await first(received, "state")
        (gpu,) = state["pools"][0]["gpus"]
        assert (gpu["index"], gpu["used_bytes"]) == (4, 60 << 30)
        text = await s.pools["cpu"].process.metrics()
        for kind, size in {"total": 140, "used": 60, "free": 79, "reserved": 0}.items():
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith("coe_gpu_memory_bytes{") and f'state="{kind}"' in line
            ]
            assert 'gpu="4"' in line
            assert float(line.split()[-1]) == size << 30
        # Figures of a driver that tells nothing any more are dropped.
        monkeypatch.setattr("service.pool.pool_process.gpu_memory", tuple)
        monkeypatch.setattr("service.pool.gpu_memory_monitor.FRESH_S", 0.0)
        assert "coe_gpu_memory_bytes{" not in await s.pools["cpu"].process.metrics()


async def test_request_history_has_failed_and_no_malformed_requests() -> None:
    config = simulated({"cpu": {"fail": "first_byte"}})
    async with run_gateway(config) as s:
        await s.ask(chat())
        await s.ask({"model": "general", "messages": []})
        recent = s.gateway.state.recent
        (one,) = recent.since(0)
        assert one["outcome"] != "ok"
        assert one["status"] >= 500


async def test_events_require_the_admin_key_once_keys_exist(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COE_TEST_KEY", "a-key-that-is-long-enough")
    keyed = Config.model_validate(
        {
            **TWO.model_dump(),
            "tenants": {"acme": {}},
            "keys": {"one": {"tenant": "acme", "key_env": "COE_TEST_KEY"}},
        }
    )
    async with run_gateway(keyed) as s:
        for given in ({}, {"authorization": "Bearer a-key-that-is-long-enough"}):
            async with s.client.get(s.url + "/console/events", headers=given) as reply:
                assert reply.status == 401
                assert (await reply.json())["error"]["code"]
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        async with s.client.get(s.url + "/console/events", headers=admin) as reply:
            assert (await first(events(reply), "hello"))["experts"]


async def test_events_end_when_the_pool_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway(TWO) as s, s.get("/console/events") as reply:
        received = events(reply)
        await first(received, "hello")
        await s.pools["cpu"].process.pool.stop(0)
        names = [name async for name, _ in received]
        assert set(names) <= {"state", "routes"}


async def test_event_streams_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_MOST_LISTENERS", 1)
    async with run_gateway(TWO) as s, s.get("/console/events") as reply:
        await first(events(reply), "hello")
        await _refused(s)


async def _refused(s: RunningGateway) -> None:
    async with s.get("/console/events") as second:
        assert second.status == 503
        assert (await second.json())["error"]["code"] == "over_capacity"


async def test_events_end_when_the_state_can_not_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A page then asks again; one that was kept waiting would show the last state for ever."""
    async with run_gateway(TWO) as s:
        feed = s.gateway.current.events
        async with s.get("/console/events") as reply:
            received = events(reply)
            assert await first(received, "hello")

            def state() -> Any:
                raise KeyError("what nobody thought of")

            with monkeypatch.context() as patched:
                patched.setattr(feed, "state", state)
                async with asyncio.timeout(120):
                    assert [name async for name, _ in received if name == "hello"] == []
        async with s.get("/console/events") as reply:
            assert await first(events(reply), "state")
