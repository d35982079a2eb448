"""Unmet demand loads a cold expert that no single request would wait for."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import aiohttp

from service.config import Config
from service.gateway.gateway_reload import GatewayRuntime
from service.types import Residency
from tests.support.in_process_service import CHAT, SECRET, run_pool, serving, until

GATEWAYS = 4
FILL_S = 2.0
CONFIG = Config.model_validate(
    {
        # A lead of 0.06 is worth 0.24 s at auto:fast, and bringing `rare` takes 2.
        "experts": {
            "common": {"model": "m", "categories": ["general"], "quality": {"rare": 0.54}},
            "rare": {"model": "m", "categories": ["rare"], "quality": {"rare": 0.6}},
        },
        "pools": {
            kind: {
                "engine": "simulated",
                "slots": 1,
                "swap": {"min_stay_s": 0.05},
                "simulated": {"fill_s": FILL_S, "swap_s": 0.02, "tokens": 2, "decode_ms": 2},
            }
            for kind in ("left", "right")
        },
    }
)


async def test_unmet_demand_of_four_gateways_loads_the_expert_in_one_pool() -> None:
    seen = await _load_by_unmet_demand()
    assert all(Residency.DISK in both for both in seen), f"loaded in two pools: {seen}"


async def _load_by_unmet_demand() -> set[tuple[Residency, ...]]:
    """The states of the expert in both pools, seen until it answers."""
    async with AsyncExitStack() as stack:
        pools = [await stack.enter_async_context(run_pool(CONFIG, kind)) for kind in CONFIG.pools]
        urls = []
        for i in range(GATEWAYS):
            gateway = GatewayRuntime(
                CONFIG,
                f"gateway-{i}",
                SECRET,
                admin_key=None,
                wake=lambda _: None,
                behind_serve=False,
            )
            await gateway.start()
            stack.push_async_callback(gateway.stop)
            gateway.directory.update([pool.address for pool in pools])
            links = gateway.directory.links
            await until(lambda links=links: len(links()) == len(pools), "the gateway knows both")
            urls.append((await stack.enter_async_context(serving(gateway))).url)
        client = await stack.enter_async_context(aiohttp.ClientSession())

        def states() -> list[Residency]:
            return [pool.process.pool.snapshot().experts["rare"].state for pool in pools]

        async def ask(i: int) -> str:
            model = "auto:fast/rare" if i % 10 < 3 else "common"
            body = {"model": model, "messages": [{"role": "user", "content": "x"}]}
            async with client.post(urls[i % GATEWAYS] + CHAT, json=body) as reply:
                assert reply.status == 200, await reply.text()
                return str((await reply.json())["model"])

        assert states() == [Residency.DISK, Residency.DISK]
        assert await ask(0) == "common", "a single request doesn't wait for two seconds"
        seen: set[tuple[Residency, ...]] = set()
        answered = "common"
        began = time.monotonic()
        i = 0
        while answered != "rare":
            assert time.monotonic() - began < 60 * FILL_S, "it was never loaded"
            batch = [asyncio.create_task(ask(i + k)) for k in range(10)]
            i += 10
            answers = await asyncio.gather(*batch)
            seen.add(tuple(states()))
            answered = "rare" if "rare" in answers[:3] else "common"
            await asyncio.sleep(0.05)
        return {*seen, tuple(states())}
