"""Replicas of one kind: a hot expert gets a second copy, and a removed replica cuts nothing.

A gateway and the pools run in this process; autoscaling by Ray Serve has tests of its own.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from service.broker.pool_state import PoolView
from service.broker.unmet_demand import pool_for_demand
from service.config import Config
from service.gateway.gateway_reload import GatewayRuntime
from service.types import Residency
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import CHAT, SECRET, RunningPool, run_pool, serving, until

TOKENS, DECODE_S = 10, 0.02
CONFIG = Config.model_validate(
    {
        "experts": {"calm": {"model": "m"}, "hot": {"model": "m"}},
        "pools": {
            "main": {
                "engine": "simulated",
                "slots": 1,
                "min_replicas": 1,
                "max_replicas": 2,
                "swap": {"min_stay_s": 0.1, "prefetch": False},
                "simulated": {
                    "fill_s": 0.1,
                    "swap_s": 0.02,
                    "tokens": TOKENS,
                    "decode_ms": DECODE_S * 1000,
                    "max_num_seqs": 2,
                },
            }
        },
    }
)


@dataclass
class Site:
    """A gateway, its replicas so far, and a client."""

    gateway: GatewayRuntime
    url: str
    client: aiohttp.ClientSession
    stack: AsyncExitStack
    pools: list[RunningPool]

    async def add(self) -> RunningPool:
        """Start another replica, and let the gateway know of it."""
        pool = await self.stack.enter_async_context(run_pool(CONFIG, "main"))
        self.pools.append(pool)
        self.know(self.pools)
        links = self.gateway.directory.links
        await until(lambda: len(links()) == len(self.pools), "the gateway knows it")
        return pool

    def know(self, pools: list[RunningPool]) -> None:
        """Let the gateway know these pools, as Serve tells it."""
        self.gateway.directory.update([pool.address for pool in pools])

    async def ask(self, expert: str, tokens: int = TOKENS) -> int:
        """Ask for a stream, and return the number of its chunks."""
        body: Any = {
            "model": expert,
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": tokens,
        }
        async with self.client.post(self.url + CHAT, json=body) as reply:
            assert reply.status == 200, await reply.text()
            text = await reply.text()
        assert text.rstrip().endswith("data: [DONE]"), text[-200:]
        return text.count('"content":"')

    def holding(self, expert: str) -> int:
        """The replicas that could answer with an expert at once."""
        return sum(
            pool.process.pool.snapshot().experts[expert].state is Residency.DEVICE
            for pool in self.pools
        )


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    """One replica at first."""
    async with AsyncExitStack() as stack:
        gateway = GatewayRuntime(
            CONFIG, "gateway", SECRET, admin_key=None, wake=lambda _: None, behind_serve=False
        )
        await gateway.start()
        stack.push_async_callback(gateway.stop)
        served = await stack.enter_async_context(serving(gateway))
        client = await stack.enter_async_context(aiohttp.ClientSession())
        made = Site(gateway, served.url, client, stack, [])
        await made.add()
        assert await made.ask("hot") == TOKENS
        yield made


async def test_second_replica_gets_a_copy_of_the_expert_with_the_queue() -> None:
    async with site() as s:
        with held_answers() as gate:
            waiting = [asyncio.create_task(s.ask("hot")) for _ in range(12)]
            first = s.pools[0].process.pool
            await until(lambda: first.load().backlog_s.get("hot", 0) > 0, "a queue")
            await s.add()
            # The queue moves to nobody; what comes now goes where it is served sooner.
            waiting += [asyncio.create_task(s.ask("hot")) for _ in range(12)]
            await until(lambda: s.holding("hot") == 2, "both replicas hold it")
            gate.open()
            assert {*await asyncio.gather(*waiting)} == {TOKENS}
        # Both run it, and the other expert is not forgotten.
        assert await s.ask("calm") == TOKENS


async def test_second_replica_leaves_an_expert_without_a_queue_where_it_is() -> None:
    async with site() as s:
        await s.add()
        seen = Counter[int]()
        for _ in range(10):
            assert await s.ask("hot") == TOKENS
            seen[s.holding("hot")] += 1
        assert seen == {1: 10}


async def test_removed_replica_ends_its_streams_and_gets_neither_requests_nor_demand() -> None:
    async with site() as s:
        await s.add()

        def queued() -> list[int]:
            return [pool.process.pool.queued() for pool in s.pools]

        with held_answers() as gate:
            waiting = [asyncio.create_task(s.ask("hot", 60)) for _ in range(8)]
            await until(lambda: sum(queued()) == 8 and all(queued()), "both are busy")
            left, stays = s.pools
            had = left.process.pool.queued()
            left.process.pool.refuse_new()
            # Before Serve tells of the removal, a gateway may still choose the replica once.
            late = asyncio.create_task(s.ask("hot"))
            await until(lambda: stays.process.pool.queued() == 8 - had + 1, "it goes to the other")
            views = [
                PoolView(pool.address.boot, pool.process.pool.snapshot(), 0.0, {})
                for pool in s.pools
            ]
            for expert in CONFIG.experts:
                assert pool_for_demand(expert, views) == stays.address.boot
            s.know([stays])
            gate.open()
            assert await late == TOKENS
            assert await s.ask("calm") == TOKENS
            assert left.process.pool.queued() <= had
            assert {*await asyncio.gather(*waiting)} == {60}
        assert left.process.pool.queued() == 0


async def test_replaced_pool_sends_requests_to_the_one_that_comes() -> None:
    async with site() as s:
        (old,) = s.pools
        with held_answers(limit=60) as gate:
            running = asyncio.create_task(s.ask("hot", tokens=60))
            await until(lambda: gate.held == 1, "it runs")
            old.process.pool.refuse_new(replaced=True)
            # The gateway may not know of it yet, and there is no other pool.
            waiting = [asyncio.create_task(s.ask("hot")) for _ in range(4)]
            await until(lambda: s.gateway.state.metrics.in_flight == 5, "the gateway has them")
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in waiting)
            await s.add()
            assert await asyncio.gather(*waiting) == [TOKENS] * 4
            gate.open()
            assert await running == 60


async def test_expert_that_moves_to_another_kind_takes_its_requests_along() -> None:
    after = CONFIG.model_dump(exclude_unset=True)
    main = after["pools"]["main"]
    after["pools"] = {"main": {**main, "experts": ["calm"]}, "own": {**main, "experts": ["hot"]}}
    moved = Config.model_validate(after)
    async with site() as s:
        (old,) = s.pools
        # Two run, and the others wait in the pool that loses the expert.
        with held_answers(limit=40) as gate:
            crowd = [asyncio.create_task(s.ask("hot", tokens=40)) for _ in range(6)]
            await until(lambda: gate.held == 2 and old.process.pool.queued() == 6, "a queue")
            await old.process.reload(moved)
            await s.gateway.reload(moved)
            late = asyncio.create_task(s.ask("hot"))
            await until(lambda: s.gateway.state.metrics.in_flight == 7, "the gateway has it")
            own = await s.stack.enter_async_context(run_pool(moved, "own"))
            s.know([old, own])
            gate.open()
            assert await asyncio.gather(*crowd) == [40] * 6
            assert await late == TOKENS
        assert await s.ask("calm") == TOKENS
