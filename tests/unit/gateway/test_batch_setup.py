"""Batches of a gateway whose config is replaced meanwhile."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from service.broker.pool_state import PoolView
from service.gateway.batch_setup import CurrentGateway
from service.rpc.snapshot import ExpertState, Snapshot
from service.types import Residency


def gateway(**members: tuple[str, ...]) -> Any:
    """A gateway whose one pool has two places."""
    states = {"warm": ExpertState(Residency.DEVICE)}
    snapshot = Snapshot("boot", "cpu", experts=states, capacity={"warm": 2})
    view = PoolView("boot", snapshot, 0.0, {})
    return SimpleNamespace(
        dispatcher=SimpleNamespace(views=lambda: [view]), batch_members=dict(members)
    )


async def test_line_that_waits_for_its_turn_during_a_reload_gets_it() -> None:
    gateways = [gateway(recipe=("warm",)), gateway(recipe=("warm", "other"))]
    batches = CurrentGateway(lambda: gateways[0])
    for _ in range(2):
        assert await batches.turn(["recipe"]) == "recipe"
    waiting = asyncio.create_task(batches.turn(["recipe"]))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    del gateways[0]
    await asyncio.sleep(0.05)
    assert not waiting.done(), "the lines of before have their places still"
    batches.ended("recipe")
    async with asyncio.timeout(5):
        assert await waiting == "recipe"
    # Nothing is left of lines whose recipe had other experts when they ended.
    for _ in range(2):
        batches.ended("recipe")
    async with asyncio.timeout(5):
        for _ in range(2):
            assert await batches.turn(["warm"]) == "warm"
