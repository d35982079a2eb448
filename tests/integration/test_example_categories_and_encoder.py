"""Categories with examples and the encoder, through the gateway's whole application."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from tests.support.in_process_service import RunningGateway, run_gateway, simulated
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts

EXPERTS = {name: {"model": "m", "categories": [name]} for name in ("general", *SUBJECTS)}


def categories(*names: str) -> dict[str, Any]:
    return {name: {"examples": prompts(name, 6), "description": SUBJECTS[name]} for name in names}


async def asked(s: RunningGateway, text: str) -> dict[str, Any]:
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    async with s.post(body, "/v1/route") as reply:
        assert reply.status == 200
        found: dict[str, Any] = await reply.json()
        return found


async def test_categories_are_live_after_a_reload_and_the_encoder_joins(tmp_path: Path) -> None:
    text = "please sue the landlord in court"
    async with run_gateway(simulated({"cpu": {}}, experts=EXPERTS)) as s:
        assert (await asked(s, text))["stage"] is None
        config = simulated({"cpu": {}}, experts=EXPERTS, categories=categories("law", "food"))
        await s.gateway.reload(config)
        found = await asked(s, text)
        assert (found["category"], found["stage"]) == ("law", "static")
        encoder = {
            "model": str(make_encoder(tmp_path)),
            "when_below": 1.0,
            "min_gain": 0.0,
            "timeout_ms": 1000,
        }
        config = simulated(
            {"cpu": {}},
            experts=EXPERTS,
            categories=categories("law", "food"),
            router={"encoder": encoder},
        )
        await s.gateway.reload(config)
        async with asyncio.timeout(120):
            while (found := await asked(s, text))["stage"] != "encoder":
                assert found["category"] == "law"  # the first stage decides until then
                await asyncio.sleep(0.05)
        assert found["category"] == "law"
        body = {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        async with s.post(body) as reply:
            assert reply.headers["x-coe-router-stage"] == "encoder"
            assert reply.headers["x-coe-category"] == "law"
        async with s.get("/metrics") as reply:
            shown = await reply.text()
        assert "coe_router_stage_total{" in shown
        assert 'reason="ok"' in shown
        assert text not in shown


async def test_the_built_in_router_sorts_prompts_where_no_artifact_is_named() -> None:
    experts = {
        "general": {"model": "m", "categories": ["general"]},
        "data": {"model": "m", "categories": ["shell-sql"]},
    }
    async with run_gateway(simulated({"cpu": {}}, experts=experts, router={"artifact": None})) as s:
        found = await asked(s, "SELECT all users older than 30 in SQL")
        assert (found["category"], found["stage"]) == ("shell-sql", "static")
        assert found["chosen"] == "data"
        assert (await asked(s, "Give me a recipe for lasagna"))["chosen"] == "general"
