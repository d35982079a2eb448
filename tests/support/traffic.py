"""A site with something of everything, and traffic that makes every one of our metrics move."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from service.config import Config
from service.engine.base import RoutingSample
from tests.integration.test_recipes import Cast
from tests.support.serving import RunningGateway, chat, run_gateway, serving, simulated
from tests.support.waiting import until

# The first two differ, so that the cascade goes on to the strong one.
LINES = {"far": "41", "near": "42", "strong": "The answer is 42."}


def everything(url: str) -> Config:
    """Two experts that share a slot, remote ones with a cascade, prices and a budget."""
    local = simulated({"cpu": {"tokens": 6, "decode_ms": 2, "swap_s": 0.01}})
    given = local.model_dump(mode="json", exclude_defaults=True)
    price = {"prompt": 10.0, "completion": 10.0}

    def far(name: str) -> dict[str, object]:
        return {"remote": {"url": url + "/v1", "model": name}, "price": price}

    given["experts"] = {
        "general": {"model": "m", "categories": ["general"], "price": price},
        "math": {"model": "m", "categories": ["math"], "price": price},
        "far": far("far"),
        "near": far("near"),
        "strong": far("strong"),
    }
    given["recipes"] = {
        "careful": {"kind": "cascade", "members": ["far", "near"], "later": ["strong"]}
    }
    given["pools"]["cpu"] |= {"slots": 1, "swap": {"min_stay_s": 0.02}}
    given["tenants"] = {
        "default": {
            "guard": {"pii": {"action": "flag"}},
            "cache": {"mode": "exact"},
        }
    }
    given["budgets"] = {"all": {"amount": 1000.0, "period": "day"}}
    return Config.model_validate(given)


@asynccontextmanager
async def busy_site() -> AsyncIterator[RunningGateway]:
    """The site, and its upstream."""
    cast = Cast()
    cast.lines = dict(LINES)
    async with serving(cast) as upstream, run_gateway(everything(upstream.url)) as s:
        yield s


def routers_choose(s: RunningGateway) -> None:
    """As an engine tells it that runs a mixture of experts."""
    stretch = np.zeros((1, 32, 2), np.int16)
    stretch[:, :, 1] = 1
    load = np.array([[32, 32, 0, 0]], np.int64)
    sample = RoutingSample("general", (0,), 4, 2, 32, load, (stretch,))
    s.pools["cpu"].process.pool_metrics.on_routing_sample(sample)


async def round_of_traffic(s: RunningGateway) -> None:
    """Every kind of request once: streamed or not, routed, swapped, remote, refused, failed."""
    routers_choose(s)
    for model in ("general", "math", "auto", "auto/math"):
        for stream in (True, False):
            async with s.post(chat(model=model, stream=stream, max_tokens=6)) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
    usage = {"stream_options": {"include_usage": True}}
    for model in ("far", "careful"):
        async with s.post(chat(model=model, stream=model == "far", **usage)) as reply:
            assert reply.status == 200, await reply.text()
            await reply.read()
    status, _, _ = await s.ask(chat("write to somebody@example.com", model="general"))
    assert status == 200
    for _ in range(2):
        kept = {"x-coe-cache": "exact"}
        status, _, _ = await s.ask(chat("again", model="general", temperature=0), headers=kept)
        assert status == 200
    status, _, _ = await s.ask(chat(model="nobody"))
    assert status == 404


async def an_engine_dies(s: RunningGateway) -> None:
    """While requests run on it: they are answered by the next one."""
    pool = s.pools["cpu"]
    running = [asyncio.create_task(s.ask(chat(model="general", max_tokens=400))) for _ in range(2)]
    await until(lambda: pool.engine.now == 2, "both run")
    pool.engine.kill("told to die")
    for status, _, _ in await asyncio.gather(*running):
        assert status == 200
