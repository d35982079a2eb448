"""A dedicated slot, event by event; tests/property tests it under random events."""

from __future__ import annotations

import asyncio

import pytest

from service.config import SimulatedOptions
from service.engine.simulated_engine import SimulatedEngine
from service.errors import ConflictError, ExpertFailedError, PoolDrainingError
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.pool.slots.idle_unload import IdlePolicy
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
        async with asyncio.timeout(60):
            while self.slot.states()[expert].state is not state:
                self.told.clear()
                await self.told.wait()

    async def ask(self, expert: str) -> None:
        async with self.slot.lease(expert) as lease:
            assert lease.engine is self.engines[0]

    async def close(self) -> None:
        self.supervisor.cancel()
        done, _ = await asyncio.wait({self.supervisor}, timeout=60)
        assert done == {self.supervisor}
        assert self.engines[-1].failure() is not None


async def test_base_expert_is_served_while_its_adapters_load() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    tuned = asyncio.create_task(stage.ask("tuned"))
    await asyncio.sleep(0)
    # One that waits for the adapter is ahead; it must not hold this one up.
    await asyncio.wait_for(stage.ask("base"), 60)
    assert not tuned.done()
    stage.engines[0].go_on.set()
    await asyncio.wait_for(tuned, 60)
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
        draining = asyncio.create_task(stage.slot.drain(60))
        await asyncio.sleep(0)
        with pytest.raises(PoolDrainingError):
            await stage.ask("base")
        assert not draining.done()
    await asyncio.wait_for(draining, 60)
    await stage.close()


async def test_lease_of_an_expert_that_fails_to_load_raises_its_reason() -> None:
    stage = Stage(broken="its rank is odd")
    await stage.until("base", Residency.DEVICE)
    waiting = asyncio.create_task(stage.ask("tuned"))
    await asyncio.sleep(0)
    stage.engines[0].go_on.set()
    with pytest.raises(ExpertFailedError, match="its rank is odd"):
        await asyncio.wait_for(waiting, 60)
    assert stage.slot.states()["base"].state is Residency.DEVICE
    await stage.close()


async def rest(stage: Stage) -> None:
    await stage.until("base", Residency.DEVICE)
    stage.engines[-1].go_on.set()
    await stage.until("tuned", Residency.DEVICE)
    assert await asyncio.wait_for(stage.slot.release(), 60)


async def test_release_ends_the_engine_until_somebody_asks() -> None:
    stage = Stage()
    await rest(stage)
    assert stage.slot.resting
    assert stage.engines[0].failure() is not None
    for state in stage.slot.states().values():
        assert (state.state, state.released) == (Residency.DISK, True)
        assert state.max_model_len  # what it can do is known
    assert not await stage.slot.release()  # there is nothing to give back
    async with asyncio.timeout(60), stage.slot.lease("base") as lease:
        assert lease.engine is stage.engines[1]
        with pytest.raises(ConflictError, match="requests run or wait"):
            await stage.slot.release()
    assert stage.slot.unloads == {("base", "unload"): 1}
    await stage.close()


async def test_release_while_adapters_load_is_refused() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    with pytest.raises(ConflictError, match="weights are being loaded"):
        await stage.slot.release()
    await stage.close()


async def test_slot_at_rest_takes_in_adapters_and_loads_them_with_the_next_engine() -> None:
    stage = Stage()
    await rest(stage)
    await stage.slot.add_adapter("more", "folder")
    await stage.slot.remove_adapter("tuned", "gone")
    assert stage.slot.states()["more"].released
    assert stage.slot.resting
    async with asyncio.timeout(60), stage.slot.lease("more"):
        assert stage.slot.states()["more"].state is Residency.DEVICE
    await stage.close()


async def test_unmet_demand_ends_a_rest_and_so_does_a_load() -> None:
    stage = Stage()
    await rest(stage)
    stage.slot.record_demand("base", 0.6, asyncio.get_running_loop().time())
    assert stage.slot.resting
    stage.slot.record_demand("base", 0.6, asyncio.get_running_loop().time())
    await stage.until("base", Residency.DEVICE)
    await rest(stage)
    await stage.slot.operate("load", "tuned")
    await stage.until("base", Residency.DEVICE)
    await stage.close()


async def test_idle_slot_rests_by_itself_and_not_while_requests_run() -> None:
    stage = Stage()
    await stage.until("base", Residency.DEVICE)
    stage.engines[0].go_on.set()
    await stage.until("tuned", Residency.DEVICE)
    async with stage.slot.lease("tuned"):
        # Idle since long ago, by the limits, but for this request.
        stage.slot.idle_policy = IdlePolicy({"base": 1e-9, "tuned": 1e-9})
        stage.slot.report_engine_death()  # wakes the supervisor
        await asyncio.sleep(0.3)
        assert not stage.slot.resting
    await stage.until("base", Residency.DISK)
    assert stage.slot.unloads == {("base", "idle"): 1}
    await stage.close()
