"""Slots that unload idle experts: no request is lost, and none runs while the memory is away."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ConflictError
from service.pool.slots.idle_unload import IdlePolicy, Keep
from service.rpc.snapshot import Queue
from service.types import Residency
from tests.support.fake_clock_loop import FastTime
from tests.support.shared_slot_simulation import EXPERTS, SIZE, Stage, World, on_clock

IDLE_S = 0.3


class Ending(Stage):
    finally_resting = False
    has_engine = True
    final_states: Any = None
    # An operator's word goes before the policy.
    told_to_sleep = False


async def tell(stage: Ending, seed: int, rough: float, length: int) -> list[str]:
    """Requests, pauses, operations and faults, drawn from a seed; return each request's end."""
    draw = random.Random(seed)
    slot, clients = stage.slot, []
    supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
    releases: list[asyncio.Task[Any]] = []
    for _ in range(length):
        expert = draw.choice(EXPERTS)
        kind = draw.random()
        if kind < rough:
            fault = draw.choice(["fill", "exchange", "start", "kill", "kill"])
            if fault == "kill" and stage.world.engines:
                stage.world.engines[-1].kill("a test killed it")
                stage.world.faults += 1
            elif fault != "kill":
                stage.world.armed[fault] = draw.choice(["fail", "die"])
        elif kind < 0.45:
            clients.append(asyncio.create_task(stage.ask(expert, draw.randint(1, 4))))
        elif kind < 0.6:
            act: Any
            if draw.random() < 0.5:
                kept: Keep | None = draw.choice([None, "host", "disk"])
                stage.told_to_sleep |= kept == "host"
                act = slot.release(kept)
            else:
                act = slot.operate(draw.choice(["unload", "load", "evict", "unload"]), expert)
            releases.append(asyncio.create_task(act))
        else:
            await asyncio.sleep(draw.choice([0.001, 0.02, 0.1, IDLE_S * 1.2, 3 * IDLE_S]))
    async with asyncio.timeout(600):  # virtual seconds
        ends = await asyncio.gather(*clients)
        done = await asyncio.gather(*releases, return_exceptions=True)
    assert all(isinstance(one, ConflictError) for one in done if isinstance(one, BaseException))
    # Nobody asks any more.
    await asyncio.sleep(100)
    stage.finally_resting = slot.resting or slot.state == "asleep"
    stage.has_engine = slot.engine is not None
    stage.told_to_sleep &= slot.state == "asleep"
    stage.final_states = slot.states()
    if stage.finally_resting:
        # It comes back for whoever asks, however long it was away.
        assert await stage.ask("c") in ({"ok"} if not rough else {"ok", "expert_failed"})
    await slot.drain(5)
    supervisor.cancel()
    await asyncio.gather(supervisor, return_exceptions=True)
    assert {*slot.queues().values()} == {Queue()}
    return ends


def play(
    seed: int,
    policy: IdlePolicy,
    *,
    bound: int | None,
    rough: float = 0.0,
    length: int = 60,
    **more: Any,
) -> tuple[Ending, list[str]]:
    async def whole() -> tuple[Ending, list[str]]:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            stage = Ending(World(bound, lambda: clock.now_s), **more)
            stage.slot.idle_policy = policy
            return stage, await tell(stage, seed, rough, length)

    stage, ends = asyncio.run(whole())
    assert stage.world.wrong == []
    return stage, ends


keeps: st.SearchStrategy[Keep | None] = st.sampled_from([None, "host", "disk"])
bounds = st.sampled_from([None, SIZE, 3 * SIZE])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), keep=keeps, bound=bounds)
def test_idle_slot_answers_everybody_and_ends_without_an_engine(
    seed: int, keep: Keep | None, bound: int | None
) -> None:
    policy = IdlePolicy(dict.fromkeys(EXPERTS, IDLE_S), keep)
    stage, ends = play(seed, policy, bound=bound)
    assert set(ends) <= {"ok", "over_capacity"}
    assert stage.finally_resting
    states = stage.final_states
    assert all(state.state is not Residency.DEVICE for state in states.values())
    assert not (stage.has_engine and keep == "disk") or stage.told_to_sleep
    if not stage.has_engine:
        assert {state.state for state in states.values()} == {Residency.DISK}
        assert all(state.released and state.eta_s >= 0 for state in states.values())
    else:
        # The unit that ran last is held, and comes back by a swap.
        assert any(state.state is Residency.HOST and state.released for state in states.values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), keep=keeps, bound=bounds)
def test_idle_slot_under_faults_lets_every_request_end(
    seed: int, keep: Keep | None, bound: int | None
) -> None:
    policy = IdlePolicy(dict.fromkeys(EXPERTS, IDLE_S), keep)
    _, ends = play(seed, policy, bound=bound, rough=0.08)
    known = {"ok", "over_capacity", "expert_failed", "engine_dead", "engine_restarting"}
    assert set(ends) <= known


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), never=st.sampled_from(EXPERTS))
def test_slot_keeps_its_engine_for_an_expert_without_a_limit(seed: int, never: str) -> None:
    limits = {name: IDLE_S for name in EXPERTS if name != never}
    unit = "a" if never.startswith("a") else never
    stage, _ = play(seed, IdlePolicy(limits, "disk"), bound=None, length=30)
    held = [name for name, state in stage.final_states.items() if state.state is Residency.DEVICE]
    # It rests only where that expert was not in its memory.
    assert stage.finally_resting == (not held)
    if held:
        holds = {name for name, s in stage.final_states.items() if s.state is not Residency.DISK}
        assert unit in holds


def test_pinned_unit_keeps_the_engine_and_refuses_a_release() -> None:
    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            stage = Stage(World(None, lambda: clock.now_s), pinned="b")
            stage.slot.idle_policy = IdlePolicy(dict.fromkeys(EXPERTS, IDLE_S), "disk")
            supervisor = asyncio.create_task(stage.slot.supervise(asyncio.Lock()))
            assert await stage.ask("b") == "ok"
            assert await stage.ask("c") == "ok"
            await asyncio.sleep(50)
            states = stage.slot.states()
            assert states["b"].state is Residency.HOST
            assert states["c"].state is Residency.DEVICE
            with pytest.raises(ConflictError, match="pinned weights would leave host memory"):
                await stage.slot.release("disk")
            # The engine can sleep with them.
            assert await stage.slot.release("host")
            assert stage.slot.states()["b"].state is Residency.HOST
            assert await stage.ask("b") == "ok"
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)

    asyncio.run(whole())


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("keep", ["host", "disk"])
def test_engine_that_an_operator_wakes_is_not_released_meanwhile(keep: Keep, steps: int) -> None:
    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            slot = (stage := Ending(World(None, lambda: clock.now_s))).slot
            supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
            assert await stage.ask("a") == "ok"
            await slot.release("host")
            await slot.operate("load", "a")
            for _ in range(steps):
                await asyncio.sleep(0)
            with pytest.raises(ConflictError):
                await slot.release(keep)
            await asyncio.sleep(5)
            assert not slot.resting
            assert slot.engine is not None
            assert slot.states()["a"].state is Residency.DEVICE
            # It can be given back once it is awake.
            await slot.release(keep)
            assert slot.states()["a"].released
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)

    asyncio.run(whole())
