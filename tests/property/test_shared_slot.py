"""Experts that share a slot, under random arrivals, disconnects and every kind of failure."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ConflictError
from service.pool.slots.shared_slot import SlotState
from service.pool.swap_planner import Stay, bounded, next_fetch, next_step, units_to_evict
from service.rpc.snapshot import Queue
from service.task_cancellation import cancel_and_wait
from tests.support.fake_clock_loop import FastTime
from tests.support.garbage import collected
from tests.support.shared_slot_simulation import (
    EXPERTS,
    FILL_S,
    LOAD_S,
    MOST_TOKENS,
    SIZE,
    STAY_S,
    STEP_MS,
    SWAP_S,
    UNITS,
    WAIT_S,
    Stage,
    World,
    on_clock,
)
from tests.support.slot_events import Arrive, Kill, Leave, Turn

CAPACITY = 2
# One turn of everybody else's: fetched or started, swapped in, stayed, drained.
TURN_S = LOAD_S + FILL_S + SWAP_S + STAY_S + 2 * MOST_TOKENS * STEP_MS / 1000
RETRY_S = 30.0


@dataclass(frozen=True)
class Arm:
    call: str
    fault: str


@dataclass(frozen=True)
class Operate:
    act: str
    expert: str


def a_story(seed: int, rough: float, length: int = 120) -> list[Any]:
    """Bursts and pauses. Drawn here: hypothesis alone seldom lets two things meet in 20 ms."""
    chance = random.Random(seed)
    hot = chance.sample(EXPERTS, 2)
    story: list[Any] = []
    for _ in range(length):
        expert = chance.choice(hot) if chance.random() < 0.6 else chance.choice(EXPERTS)
        if chance.random() < rough:
            story.append(
                chance.choice(
                    [
                        Kill(),
                        Arm(chance.choice(["fill", "exchange"]), chance.choice(["fail", "die"])),
                        Arm("exchange", "spoil"),
                        Arm("start", "fail"),
                        Operate(chance.choice(["load", "evict", "pin", "unpin"]), expert),
                    ]
                )
            )
        elif (kind := chance.random()) < 0.5:
            story.append(Arrive(expert, chance.randint(1, MOST_TOKENS)))
        elif kind < 0.55:
            story.append(Leave(chance.randrange(100)))
        else:
            story.append(Turn(chance.choice([1, 2, 4, 10, 60])))
    return story


seeds = st.integers(0, 2**32)
bounds = st.sampled_from([None, SIZE, 2 * SIZE, 3 * SIZE])


async def tell(stage: Stage, story: list[Any]) -> list[Any]:
    """All of it, and every client's end."""
    world = stage.world
    supervisor = asyncio.create_task(stage.slot.supervise(asyncio.Lock()))
    clients: list[asyncio.Task[str]] = []
    for event in story:
        match event:
            case Arrive(expert, tokens):
                clients.append(asyncio.create_task(stage.ask(expert, tokens)))
            case Leave(which) if clients:
                clients[which % len(clients)].cancel()
            case Kill() if world.engines:
                world.engines[-1].kill("a test killed it")
                world.faults += 1
            case Arm(call, fault):
                world.armed[call] = fault
            case Operate(act, expert):
                try:
                    await stage.slot.operate(act, expert)
                except ConflictError:
                    assert act in ("load", "evict")
            case Turn(times):
                for _ in range(times):
                    await asyncio.sleep(0.005)
    # Virtual seconds: whoever is still here after them is stuck.
    async with asyncio.timeout(20 * RETRY_S):
        outcomes = await asyncio.gather(*clients, return_exceptions=True)
    await stage.slot.drain(1)
    supervisor.cancel()
    await asyncio.gather(supervisor, return_exceptions=True)
    return outcomes


def play(story: list[Any], world: World, **given: Any) -> tuple[Stage, list[Any]]:
    """A story from beginning to end on a loop of its own; asserts that nothing is left over."""
    complaints: list[dict[str, Any]] = []
    stages: list[Stage] = []

    async def whole() -> list[Any]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        clock = FastTime(loop)
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            stages.append(Stage(world, capacity=CAPACITY, **given))
            outcomes = await tell(stages[0], story)
        for engine in world.engines:
            assert await engine.in_flight() == 0
            assert engine.failure() is not None, "an engine was left running"
        assert len(asyncio.all_tasks()) == 1
        return outcomes

    with collected():
        outcomes = asyncio.run(whole())
    stage = stages[0]
    assert complaints == []
    assert world.wrong == []
    assert stage.running == 0
    assert stage.most_running <= CAPACITY
    assert all(queue == Queue(0, 0) for queue in stage.slot.queues().values())
    return stage, outcomes


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(
    seeds,
    bounds,
    st.sampled_from([SIZE, SIZE + 5]),
    st.sampled_from(["", "b", "d"]),
    st.booleans(),
)
def test_swapping_slot_under_faults_every_request_ends_once_on_its_own_weights(
    seed: int, bound: int | None, size_guess: int, pinned: str, preempt: bool
) -> None:
    world = World(bound, lambda: 0.0)
    _, outcomes = play(
        a_story(seed, rough=0.1), world, size_guess=size_guess, pinned=pinned, preempt=preempt
    )
    known = {"ok", "engine_dead", "engine_restarting", "over_capacity", "expert_failed"}
    strange = [o for o in outcomes if not isinstance(o, asyncio.CancelledError) and o not in known]
    assert strange == []


@settings(max_examples=60, deadline=None)
@given(seeds, bounds, st.sampled_from(["", "b"]), st.booleans())
def test_swapping_slot_without_faults_answers_all_within_max_wait(
    seed: int, bound: int | None, pinned: str, preempt: bool
) -> None:
    world = World(bound, lambda: 0.0)
    stage, outcomes = play(a_story(seed, rough=0.0), world, pinned=pinned, preempt=preempt)
    ended = [o for o in outcomes if not isinstance(o, asyncio.CancelledError)]
    assert set(ended) <= {"ok", "over_capacity"}
    assert max(stage.waits, default=0.0) <= WAIT_S + len(UNITS) * TURN_S


def overlooked(stage: Stage, now_s: float) -> str | None:
    """What the next step would change, where the controller waits for an event before it."""
    slot, policy = stage.slot, stage.slot.policy
    engine = slot.engine
    if engine is None or slot.state is not SlotState.SERVING or slot._depends_on_time():
        return None
    view = slot._slot_view(now_s)
    units = bounded(view, slot._unit_views(now_s, engine.swappable_experts), policy)
    step = next_step(view, units, policy)
    fetched = next_fetch(view, units, policy)
    evicted = units_to_evict(view, units, policy, fetched)
    if isinstance(step, Stay) and fetched is None and not evicted:
        return None
    return f"{step}, fetch {fetched}, evict {evicted}"


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_swapping_slot_that_waits_for_an_event_has_nothing_left_to_do(seed: int) -> None:
    """Requests come, are granted, refused, or leave, in any order; units are pinned and wanted."""
    chance = random.Random(seed)
    found: list[str] = []

    async def whole() -> None:
        clock = FastTime(asyncio.get_running_loop())
        with pytest.MonkeyPatch.context() as patch:
            on_clock(patch, lambda: clock.now_s)
            world = World(chance.choice([2, 3]) * SIZE, lambda: clock.now_s)
            stage = Stage(world, capacity=1)
            supervisor = asyncio.create_task(stage.slot.supervise(asyncio.Lock()))
            clients: list[asyncio.Task[str]] = []
            for _ in range(60):
                kind, expert = chance.random(), chance.choice("bcd")
                if kind < 0.35:
                    expert = chance.choice(["b", "b", expert])
                    asked = stage.ask(expert, chance.choice([1, 40, 400]))
                    clients.append(asyncio.create_task(asked))
                elif kind < 0.6 and clients:
                    clients.pop(chance.randrange(len(clients))).cancel()
                elif kind < 0.65:
                    stage.slot._refuse_unit(expert, lambda _: ConflictError("refused"))
                elif kind < 0.8:
                    stage.slot.set_pinned(expert, chance.random() < 0.5)
                else:
                    stage.slot.record_demand(expert, 0.2, clock.now_s)
                await asyncio.sleep(chance.choice([0.0, 0.01, 0.1]))
                if overlooked(stage, clock.now_s):
                    # Whatever it waits for by the clock is seen at the next look.
                    await asyncio.sleep(0.3)
                    if wrong := overlooked(stage, clock.now_s):
                        found.append(wrong)
            await cancel_and_wait(*clients, supervisor)

    asyncio.run(whole())
    assert found == []
