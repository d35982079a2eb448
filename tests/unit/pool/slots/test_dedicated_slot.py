"""A dedicated slot, event by event; tests/property tests it under random events."""

from __future__ import annotations

import asyncio

import pytest

from service.config import SimulatedOptions
from service.engine.simulated_engine import SimulatedEngine
from service.errors import ExpertFailedError, PoolDrainingError
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.types import Residency


class SlowAdapter(SimulatedEngine):
    """Its adapter takes until it is told to go on, and may turn out to be broken."""

    def __init__(self, broken: str | None) -> None:
        super().__init__(("base", "tuned"), SimulatedOptions())
        self.go_on = asyncio.Event()
        self.broken = broken

    async def load(self, expert: str, adapter: str | None = None) -> None:
        if expert == "tuned":
            await self.go_on.wait()
            if self.broken is not None:
                raise ExpertFailedError(self.broken)
        await super().load(expert, adapter)


class Stage:
    """A slot and the engines that it has had; `told` is set at every change."""

    def __init__(self, broken: str | None = None) -> None:
        self.engines: list[SlowAdapter] = []
        self.broken = broken
        self.told = asyncio.Event()
        self.slot = DedicatedSlot(
            ("base", "tuned"),
            self.build,
            capacity=4,
            max_waiting=4,
            start_guess_s=0.0,
            changed=self.told.set,
        )
        self.supervisor = asyncio.create_task(self.slot.supervise(asyncio.Lock()))

    def build(self) -> SlowAdapter:
        self.engines.append(SlowAdapter(self.broken))
        return self.engines[-1]

    async def until(self, expert: str, state: Residency) -> None:
        async with asyncio.timeout(5):
            while self.slot.states()[expert].state is not state:
                self.told.clear()
                await self.told.wait()

    async def ask(self, expert: str) -> None:
        async with self.slot.lease(expert) as lease:
            assert lease.engine is self.engines[0]

    async def close(self) -> None:
        self.supervisor.cancel()
        done, _ = await asyncio.wait({self.supervisor}, timeout=5)
        assert done == {self.supervisor}
        assert self.engines[-1].failure() is not None


async def test_base_expert_is_served_while_its_adapters_load() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    tuned = asyncio.create_task(stage.ask("tuned"))
    await asyncio.sleep(0)
    # One that waits for the adapter is ahead; it must not hold this one up.
    await asyncio.wait_for(stage.ask("base"), 5)
    assert not tuned.done()
    stage.engines[0].go_on.set()
    await asyncio.wait_for(tuned, 5)
    await stage.close()


async def test_lost_reported_for_a_previous_engine_is_ignored() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    stage.engines[0].go_on.set()
    await stage.until("tuned", Residency.DEVICE)
    stage.slot.report_engine_death()
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(stage.engines) == 1
    await stage.close()


async def test_drain_refuses_new_requests_and_waits_for_running_ones() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    async with stage.slot.lease("base"):
        draining = asyncio.create_task(stage.slot.drain(5))
        await asyncio.sleep(0)
        with pytest.raises(PoolDrainingError):
            await stage.ask("base")
        assert not draining.done()
    await asyncio.wait_for(draining, 5)
    await stage.close()


async def test_lease_of_an_expert_that_fails_to_load_raises_its_reason() -> None:
    stage = Stage(broken="its rank is odd")
    await stage.until("base", Residency.DEVICE)
    waiting = asyncio.create_task(stage.ask("tuned"))
    await asyncio.sleep(0)
    stage.engines[0].go_on.set()
    with pytest.raises(ExpertFailedError, match="its rank is odd"):
        await asyncio.wait_for(waiting, 5)
    assert stage.slot.states()["base"].state is Residency.DEVICE
    await stage.close()
