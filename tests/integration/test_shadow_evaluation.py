"""Shadow evaluation over HTTP, with simulated engines behind the gateway."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.engine import simulated_engine as engine
from service.store.api_keys import digest_of
from service.telemetry import metric_declarations
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, chat, run_gateway, simulated
from tests.support.polling import until

KEYS = {"acme": "a-key-of-the-tests-a", "other": "a-key-of-the-tests-b"}
EXPERTS = {
    name: {"model": "m", "categories": [category], "price": {"prompt": 1, "completion": 1}}
    for name, category in (("small", "math"), ("large", "general"), ("judge", "judging"))
}
SECRET = "a question that must stay secret"


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert gives the same final answer; it ends where the client wants."""
    words = ["The", " answer", " is", " 4.", " end"]
    monkeypatch.setattr(engine, "answer_text", lambda *_: words)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def config(folder: Path, *, shadow: bool = True, **given: Any) -> Config:
    base = simulated({"cpu": {"tokens": 4}}, experts=EXPERTS)
    section = {
        "share": 1.0,
        "judge": "judge",
        "budget": {"amount": 10},
        "folder": str(folder),
        **given,
    }
    keys = {name: {"tenant": name, "sha256": digest_of(key)} for name, key in KEYS.items()}
    tenants: dict[str, Any] = {
        "acme": {"shadow": shadow, "cache": {"mode": "exact"}, "requests_per_min": 2},
        "other": {},
    }
    return Config.model_validate(
        {
            **json.loads(base.model_dump_json()),
            "keys": keys,
            "tenants": tenants,
            "shadow": section,
        }
    )


async def asks(s: RunningGateway, tenant: str, **data: Any) -> str:
    body = {**chat(SECRET), "model": "auto/math", "stop": " end", **data}
    async with s.post(body, headers=bearer(KEYS[tenant])) as reply:
        text: str = await reply.text()
        assert reply.status == 200, text
        assert reply.headers["x-coe-expert"] == "small"
        return text


def rows(folder: Path) -> list[Any]:
    files = sorted(folder.rglob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


async def test_other_experts_answer_after_the_reply_and_nobody_pays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = tmp_path / "outcomes"
    async with run_gateway(config(folder)) as s:
        await asks(s, "acme")
        await asks(s, "acme", stream=True)
        await asks(s, "other")
        await until(lambda: len(rows(folder)) == 2, "two outcomes")
        for row in rows(folder):
            assert row["served"] == "small"
            assert {name: one["score"] for name, one in row["outcomes"].items()} == {
                "small": 1.0,
                "large": 1.0,
            }
            assert row["outcomes"]["large"]["cost"] > 0
        assert len({row["prompt_hash"] for row in rows(folder)}) == 1
        assert SECRET not in "".join(file.read_text() for file in folder.rglob("*.jsonl"))
        assert [path.name for path in folder.iterdir() if path.is_dir()] == ["acme"]
        assert SECRET not in caplog.text
        # They are no requests of the tenant's, which has used both of its two a minute.
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        mine, other = await s.gateway.store.counts([f"usage/{key}/{today}" for key in KEYS])
        assert mine["requests"] == 2
        assert mine["cost_micro"] == 2 * other["cost_micro"]
        assert not any(name.startswith("large/") for name in mine)
        registry = s.gateway.state.metrics.registry
        assert registry.value(metric_declarations.SHADOW_REQUESTS, "recorded") == 2
        assert registry.value(metric_declarations.SHADOW_COST, "large") > 0
        async with s.get("/metrics", headers=bearer(ADMIN_KEY)) as reply:
            assert "coe_shadow_requests_total{" in await reply.text()


async def test_a_budget_that_is_used_up_and_an_opt_out_end_it(tmp_path: Path) -> None:
    folder = tmp_path / "outcomes"
    async with run_gateway(config(folder, budget={"amount": 1e-6})) as s:
        await asks(s, "acme")
        registry = s.gateway.state.metrics.registry
        await until(
            lambda: registry.value(metric_declarations.SHADOW_REQUESTS, "over_budget") == 1,
            "a refused call",
        )
        await s.gateway.reload(config(folder, shadow=False))
        await asks(s, "acme")
        assert rows(folder) == []
