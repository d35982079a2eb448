"""The rules of the Gateway API Inference Extension's model server protocol, one test for each."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.config import Config
from tests.support.adapter_folders import adapter_folder
from tests.support.in_process_service import (
    ADMIN_KEY,
    RunningGateway,
    chat,
    run_gateway,
    simulated,
)
from tests.support.polling import until

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
METRICS = "/metrics/model-server"


def config(tmp_path: Path | None = None, **more: Any) -> Config:
    options = {"decode_ms": 20, "max_num_seqs": 2, "max_model_len": 100_000}
    return simulated(
        {"p": options, "q": options},
        experts={
            "general": {"model": "m"},
            "other": {"model": "n"},
            "math": {"base": "general", "adapter": "/adapters/math"},
            "brief": {"base": "math", "defaults": {"max_tokens": 2}},
        },
        kinds={
            "p": {"experts": ["general", "math"], "vllm": {"spare_adapters": 2}},
            "q": {"experts": ["other"]},
        },
        added_experts={"roots": [str(tmp_path)] if tmp_path else []},
        **more,
    )


async def scraped(stage: RunningGateway, **more: Any) -> dict[str, Any]:
    """The single sample of each family."""
    async with stage.get(METRICS, **more) as reply:
        assert reply.status == 200
        assert reply.headers["content-type"].startswith("text/plain")
        text = await reply.text()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge"
        (found[family.name],) = family.samples
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat(max_tokens=2)),
        ("/v1/completions", {"model": "general", "prompt": "hello", "max_tokens": 2}),
    ],
)
async def test_server_has_openai_s_completions_and_chat(path: str, body: dict[str, Any]) -> None:
    async with run_gateway(config()) as stage:
        status, _, answer = await stage.ask(body, path)
        assert (status, len(answer["choices"])) == (200, 1)


async def test_queued_and_running_requests_are_the_totals_of_all_experts() -> None:
    async with run_gateway(config()) as stage:
        replies = [
            asyncio.create_task(stage.ask(chat(model=name, max_tokens=90_000)))
            for name in ("general", "general", "general", "math", "other")
        ]

        async def counted() -> bool:
            found = await scraped(stage)
            waiting, running = (
                found[f"vllm:num_requests_{name}"].value for name in ("waiting", "running")
            )
            return (waiting, running) == (2, 3)

        await until(counted, "two wait, and three run")
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
        await until(stage.idle, "all were cancelled")


async def test_kv_cache_utilization_is_a_share() -> None:
    async with run_gateway(config()) as stage:
        registry = stage.pools["p"].process.pool_metrics.engine_registry("general")
        from prometheus_client import Gauge

        gauge = Gauge("vllm:kv_cache_usage_perc", "", ["engine"], registry=registry)
        gauge.labels("0").set(0.25)
        gauge.labels("1").set(0.75)
        found = await scraped(stage)
        assert found["vllm:kv_cache_usage_perc"].value == 0.75


async def test_lora_info_lists_adapters_and_has_the_time_as_its_value(tmp_path: Path) -> None:
    async with run_gateway(config(tmp_path)) as stage:
        before_s = time.time()
        info = (await scraped(stage))["vllm:lora_requests_info"]
        assert before_s <= info.value <= time.time()
        assert info.labels == {
            "max_lora": "3",
            "running_lora_adapters": "math",
            "waiting_lora_adapters": "",
        }
        folder = adapter_folder(tmp_path / "law")
        body = {"name": "law", "base": "general", "adapter": str(folder)}
        assert (await stage.ask(body, "/admin/experts", headers=ADMIN))[0] == 200
        info = (await scraped(stage))["vllm:lora_requests_info"]
        assert (info.labels["max_lora"], info.labels["running_lora_adapters"]) == ("3", "law,math")


async def test_adapter_is_served_by_the_model_of_the_request() -> None:
    async with run_gateway(config()) as stage:
        status, headers, _ = await stage.ask(chat(model="math", max_tokens=2))
        assert (status, headers["x-coe-expert"]) == (200, "math")


@pytest.mark.parametrize("is_open", [False, True])
async def test_metrics_need_the_admin_key_unless_they_are_opened(is_open: bool) -> None:
    given = config(server={"require_keys": True}, telemetry={"model_server_metrics": is_open})
    async with run_gateway(given) as stage:
        async with stage.get(METRICS) as reply:
            assert reply.status == (200 if is_open else 401)
        async with stage.get("/metrics") as reply:
            assert reply.status == 401
        assert await scraped(stage, headers=ADMIN)
