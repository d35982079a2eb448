"""A pool whose config changes repeatedly while engines start and requests run."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.pool.test_pool_builder import Running, config

_EXPERTS = "abcdef"


async def _story(chance: random.Random, slots: int) -> None:
    running = Running(config(_EXPERTS, slots))
    names = list(_EXPERTS)
    clients: list[asyncio.Task[str]] = []
    for _ in range(chance.randint(1, 6)):
        for _ in range(chance.randint(0, 6)):
            request = running.ask(chance.choice(_EXPERTS), chance.randint(1, 8))
            clients.append(asyncio.create_task(request))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.choice((0.0, 0.005, 0.02, 0.1)))
        names = [name for name in _EXPERTS if chance.random() < 0.7] or ["a"]
        models = {name: chance.choice("mn") for name in names}
        async with asyncio.timeout(120):
            await running.assembly.reload(config("".join(names), slots, **models))
    async with asyncio.timeout(120):
        ends = set(await asyncio.gather(*clients))
        assert ends <= {"ok", "model_not_found", "engine_restarting"}
        async with asyncio.timeout(120):
            await running.assembly.settled()
        assert [await running.ask(name) for name in names] == ["ok"] * len(names)
    assert len(running.pool.shared) <= slots
    assert set(running.pool.snapshot().experts) == set(names)
    assert running.pool.unhealthy() is None
    await running.pool.stop(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_pool_after_repeated_reloads_serves_every_expert_of_the_last_config(
    seed: int, slots: int
) -> None:
    asyncio.run(_story(random.Random(seed), slots))
