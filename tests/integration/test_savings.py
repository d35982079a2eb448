"""The savings ledger over HTTP: what a tenant sees of it, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.store.api_keys import digest_of
from tests.support.in_process_service import ADMIN_KEY, RunningGateway, chat, run_gateway, simulated
from tests.support.polling import until
from tests.support.redis_server import redis_server

KEYS = {"acme": "a-key-of-the-tests-a", "other": "a-key-of-the-tests-b"}
EXPERTS = {
    "small": {"model": "m", "categories": ["math"], "price": {"prompt": 1, "completion": 1}},
    "large": {
        "model": "n",
        "categories": ["general"],
        "quality": {"math": 0.9},
        "price": {"prompt": 10, "completion": 10},
    },
}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def config(keys: bool = True, **sections: Any) -> Config:
    base = simulated({"cpu": {"tokens": 4}}, experts=EXPERTS)
    given: dict[str, Any] = {}
    if keys:
        given["keys"] = {
            name: {"tenant": name, "sha256": digest_of(key)} for name, key in KEYS.items()
        }
        given["tenants"] = {name: {} for name in KEYS}
    return Config.model_validate({**json.loads(base.model_dump_json()), **given, **sections})


async def savings(s: RunningGateway, tenant: str) -> Any:
    async with s.get("/v1/usage", headers=bearer(KEYS[tenant])) as reply:
        told = await reply.json()
        assert told["cost_unit"] == "compute"
        return told["savings"]


async def asks(s: RunningGateway, tenant: str, model: str, *, stream: bool = False) -> None:
    body = {**chat(), "model": model, "stream": stream}
    async with s.post(body, headers=bearer(KEYS[tenant])) as reply:
        assert reply.status == 200, await reply.text()
        await reply.read()


async def test_usage_shows_what_a_tenant_saved_to_that_tenant_only() -> None:
    async with run_gateway(config()) as s:
        for stream in (False, True):
            await asks(s, "acme", "auto/math", stream=stream)
        # Whoever names an expert leaves the router no choice.
        await asks(s, "acme", "small")
        mine = await savings(s, "acme")
        assert list(mine) == ["large"], "the default baseline is the best expert overall"
        assert mine["large"]["requests"] == 2
        assert mine["large"]["saved_cost"] > 0
        assert mine["large"]["saved_cost"] == pytest.approx(
            mine["large"]["baseline_cost"] - mine["large"]["cost"], abs=2e-6
        )
        assert mine["large"]["quality_gain"] == pytest.approx(0.1)
        assert await savings(s, "other") == {}
        async with s.get("/metrics", headers=bearer(ADMIN_KEY)) as reply:
            text = await reply.text()
        assert 'coe_savings_requests_total{baseline="large"' in text
        assert 'tenant="other"' not in "".join(
            line for line in text.splitlines() if line.startswith("coe_savings")
        )
        (shown,) = s.gateway.current.events.state()["savings"]
        assert (shown["against"], shown["requests"]) == ("large", 2)


async def test_gateways_share_savings_by_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as redis:
        store = {"kind": "redis", "url": redis.url, "timeout_ms": 20_000}
        for requests in (1, 2):
            async with run_gateway(config(store=store)) as s:
                await asks(s, "acme", "auto/math")

                # The reply is sent before the request is settled.
                async def counted(expected: int = requests, s: RunningGateway = s) -> bool:
                    found = (await savings(s, "acme")).get("large", {"requests": 0})
                    return bool(found["requests"] == expected)

                await until(counted, "it is counted")
                assert (await savings(s, "acme"))["large"]["saved_cost"] > 0


async def test_savings_survive_a_reload_that_changes_the_baselines() -> None:
    async with run_gateway(config()) as s:
        await asks(s, "acme", "auto/math")
        await s.gateway.reload(config(savings={"against": ["small", "large"]}))
        await asks(s, "acme", "auto/math")
        found = await savings(s, "acme")
        assert {name: found[name]["requests"] for name in found} == {"large": 2, "small": 1}
        assert found["small"]["saved_cost"] == 0, "the baseline itself answered"
        await s.gateway.reload(config(savings={"against": []}))
        await asks(s, "acme", "auto/math")
        assert await savings(s, "acme") == found


@pytest.mark.parametrize("stream", [False, True])
async def test_savings_without_keys_are_counted_for_the_console(stream: bool) -> None:
    async with run_gateway(config(keys=False)) as s:
        async with s.post({**chat(), "model": "auto/math", "stream": stream}) as reply:
            assert reply.status == 200
            await reply.read()
        (shown,) = s.gateway.current.events.state()["savings"]
        assert shown["requests"] == 1
        assert shown["saved_cost"] > 0


@pytest.mark.parametrize(
    ("against", "named"),
    [(["nobody"], "no expert 'nobody'"), (["small", "small"], "twice"), (["small"] * 5, "at most")],
)
def test_config_with_wrong_baselines_is_refused(against: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(savings={"against": against})
