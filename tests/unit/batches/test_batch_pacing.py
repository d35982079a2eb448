"""When lines of batches may start, beside people."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batches.batch_pacing import BatchPacer
from service.broker.pool_state import PoolView
from service.rpc.snapshot import ExpertState, Queue, Snapshot
from service.types import Residency


@dataclass
class Stage:
    """One pool with one slot for `warm`, which is resident, and `cold`; four places."""

    now_s: float = 100.0
    queues: dict[str, Queue] = field(default_factory=dict)
    capacity: int = 4
    most: int = 64
    failed: bool = False

    def views(self) -> list[PoolView]:
        states = {
            "warm": ExpertState(Residency.FAILED if self.failed else Residency.DEVICE),
            "cold": ExpertState(Residency.HOST, eta_s=1, swap_s=1),
        }
        capacity = dict.fromkeys(states, self.capacity)
        snapshot = Snapshot(
            "boot", "cpu", experts=states, queues=dict(self.queues), capacity=capacity
        )
        return [PoolView("boot", snapshot, 0.0, {})]

    def pacer(self) -> BatchPacer:
        return BatchPacer(
            self.views,
            lambda: {"both": ("warm", "cold"), "recruit": ()},
            self.most,
            lambda: self.now_s,
            lambda name: name != "gone",
        )


async def started(pacer: BatchPacer, model: str) -> int:
    """Start lines until one has to wait."""
    count = 0
    while count < 50:
        try:
            async with asyncio.timeout(0.05):
                await pacer.turn([model])
        except TimeoutError:
            return count
        count += 1
    return count


async def test_turn_fills_an_idle_engine_and_no_more() -> None:
    stage = Stage()
    pacer = stage.pacer()
    assert await started(pacer, "warm") == 4
    # The snapshot shows them, which changes nothing.
    stage.queues = {"warm": Queue(0, 4, 4, 0, 0, 4)}
    assert await started(pacer, "warm") == 0
    pacer.ended("warm")
    assert await started(pacer, "warm") == 1


async def test_turn_leaves_room_for_people_and_one_more() -> None:
    stage = Stage(queues={"warm": Queue(0, 1, 1)}, capacity=8)
    pacer = stage.pacer()
    assert await started(pacer, "warm") == 6
    stage.queues = {"warm": Queue(0, 6, 6, 0, 0, 6)}
    assert await started(pacer, "warm") == 0  # they may come back
    stage.now_s += 31
    assert await started(pacer, "warm") == 2


async def test_turn_pauses_while_people_wait() -> None:
    stage = Stage(queues={"cold": Queue(1, 0, 1)}, capacity=8)
    pacer = stage.pacer()
    assert await started(pacer, "warm") == 0
    stage.queues = {}
    assert await started(pacer, "warm") > 0


async def test_turn_lets_few_lines_wait_for_a_cold_expert_and_the_resident_one_go_on() -> None:
    pacer = Stage(capacity=8).pacer()
    turns = [await pacer.turn(["cold", "warm"]) for _ in range(10)]
    assert turns == ["cold"] * 2 + ["warm"] * 8
    assert pacer.next_model(["cold", "warm"]) is None


async def test_turn_does_not_bring_in_a_later_expert_while_an_earlier_one_has_the_slot() -> None:
    pacer = Stage(capacity=4).pacer()
    assert [await pacer.turn(["warm", "cold"]) for _ in range(4)] == ["warm"] * 4
    assert pacer.next_model(["warm", "cold"]) is None
    assert pacer.next_model(["cold"]) == "cold"


async def test_turn_of_a_recipe_waits_for_all_its_first_experts() -> None:
    stage = Stage()
    pacer = stage.pacer()
    assert await started(pacer, "both") == 1
    pacer.ended("both")
    assert await started(pacer, "both") == 1


async def test_turn_without_a_pool_starts_one_line_to_wake_it() -> None:
    pacer = Stage(failed=True).pacer()
    assert await started(pacer, "warm") == 1
    assert await started(pacer, "elsewhere") == 1


@pytest.mark.parametrize("model", ["gone", "recruit"])
async def test_turn_of_a_line_that_any_expert_may_answer_waits_for_room_anywhere(
    model: str,
) -> None:
    stage = Stage()
    pacer = stage.pacer()
    running = 0
    # Its lines start one after another, as the pool shows those before.
    while running < 10 and pacer.next_model([model]) is not None:
        await pacer.turn([model])
        running += 1
        stage.queues["warm"] = Queue(0, running, running, 0, 0, running)
        stage.now_s += 2
        pacer.next_model([model])
        stage.now_s += 2
    assert running == 4
    # People who wait go first.
    stage.queues["warm"] = Queue(1, 3, 4, 10)
    assert pacer.next_model([model]) is None
    stage.queues.clear()
    for _ in range(running):
        pacer.ended(model)
    # Where nothing is resident, one line makes the service load an expert.
    stage.failed = True
    assert await started(pacer, model) == 1


async def test_turn_counts_lines_of_other_gateways() -> None:
    stage = Stage(queues={"warm": Queue(0, 3, 3, 0, 0, 3)})
    pacer = stage.pacer()
    await pacer.turn(["warm"])
    stage.queues = {"warm": Queue(0, 4, 4, 0, 0, 4)}
    stage.now_s += 1.1
    assert await started(pacer, "warm") == 0


async def test_turn_forgets_lines_that_have_ended_before_the_snapshot_does() -> None:
    stage = Stage()
    pacer = stage.pacer()
    await started(pacer, "warm")
    stage.queues = {"warm": Queue(0, 4, 4, 0, 0, 4)}
    for _ in range(4):
        pacer.ended("warm")
    assert await started(pacer, "warm") == 4


@given(
    capacity=st.integers(1, 8),
    waiting=st.integers(0, 3),
    running=st.integers(0, 8),
)
def test_may_start_never_where_people_wait_and_never_beyond_the_engine(
    capacity: int, waiting: int, running: int
) -> None:
    running = min(running, capacity)
    stage = Stage(queues={"warm": Queue(waiting, running, waiting + running)}, capacity=capacity)
    pacer = stage.pacer()
    lines = 0
    while lines < 20 and pacer.next_model(["warm"]) is not None:
        pacer._own["warm"] += 1
        lines += 1
    assert lines == 0 or not waiting
    assert lines + running <= capacity


@pytest.mark.parametrize("times", [1, 3])
def test_ended_more_often_than_started_does_no_harm(times: int) -> None:
    pacer = Stage().pacer()
    for _ in range(times):
        pacer.ended("warm")
    assert pacer.next_model(["warm"]) == "warm"


@pytest.mark.parametrize(("capacity", "most", "cold"), [(64, 16, 8), (64, 1, 1), (16, 64, 4)])
async def test_lines_for_a_cold_expert_leave_places_for_those_of_resident_ones(
    capacity: int, most: int, cold: int
) -> None:
    stage = Stage(capacity=capacity, most=most)
    pacer = stage.pacer()
    assert await started(pacer, "cold") == cold
    assert await started(pacer, "absent") == (cold < most // 2)
    assert await pacer.turn(["cold", "warm"]) == "warm"
