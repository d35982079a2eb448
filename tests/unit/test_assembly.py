"""A pool that goes on by another config."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from service.assembly import Assembly
from service.config import Config
from service.engine.protocol import Message
from service.errors import CoeError, UnknownModel
from service.link.call import Call
from service.pool.pool import Pool
from service.telemetry.pool_metrics import PoolMetrics
from tests.support.waiting import until


def config(names: str, slots: int | None, **changed: Any) -> Config:
    experts = {name: {"model": changed.get(name, "m")} for name in names}
    simulated = {"decode_ms": 10, "tokens": 4, "fill_s": 0.02, "swap_s": 0.01}
    pool: dict[str, Any] = {"engine": "simulated", "simulated": simulated}
    if slots is not None:
        pool |= {"slots": slots, "swap": {"min_stay_s": 0.0}}
    return Config.model_validate({"experts": experts, "pools": {"p": pool}})


class Running:
    """A pool by a config."""

    def __init__(self, first: Config) -> None:
        watch = PoolMetrics()
        self.pool = Pool("p")
        self.assembly = Assembly(first, "p", self.pool, watch)
        self.pool.start()

    async def ask(self, expert: str, tokens: int = 4) -> str:
        body = orjson.dumps({"prompt": "x", "max_tokens": tokens})
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        call = Call("/v1/completions", expert, "r", 10_000, False, "g", 1)
        try:
            await self.pool.run(call, body, send)
        except CoeError as error:
            return error.code
        return "ok" if f"{expert}:".encode() in sent[-1]["body"] else repr(sent)


@pytest.mark.parametrize("slots", [None, 1, 2])
async def test_experts_come_and_go(slots: int | None) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    # One runs, one is asked for, one is new.
    long = asyncio.create_task(running.ask("c", 60))
    await until(lambda: running.pool.snapshot().queues["c"].running == 1, "c runs")
    waiting = asyncio.create_task(running.ask("b")) if slots == 1 else None
    await asyncio.sleep(0)
    await running.assembly.reload(config("ad", slots))
    assert await long == "ok", "who ran was not let end"
    if waiting is not None:
        assert await waiting in ("model_not_found", "ok")
    assert set(running.pool.snapshot().experts) == {"a", "d"}
    assert [await running.ask(name) for name in "ad"] == ["ok"] * 2
    with pytest.raises(UnknownModel):
        await running.pool.operate("load", "b")
    assert running.pool.unhealthy() is None
    await running.pool.stop(1)


@pytest.mark.parametrize("slots", [None, 1])
async def test_an_expert_that_changes_is_another_one(slots: int | None) -> None:
    running = Running(config("abc", slots))
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    await running.assembly.reload(config("abc", slots, b="n"))
    assert running.pool.details()["b"].get("host_bytes", 0) == 0 or slots is None
    assert [await running.ask(name) for name in "abc"] == ["ok"] * 3
    await running.pool.stop(1)


async def test_the_policy_of_swaps_changes_with_it() -> None:
    running = Running(config("abc", 1))
    other = config("abc", 1)
    swap = other.pools["p"].swap.model_copy(update={"max_wait_s": 7.0, "running": "preempt"})
    pool = other.pools["p"].model_copy(update={"swap": swap})
    await running.assembly.reload(other.model_copy(update={"pools": {"p": pool}}))
    policy = running.pool.shared[0].policy
    assert (policy.max_wait_s, policy.preempt) == (7.0, True)
    await running.pool.stop(1)
