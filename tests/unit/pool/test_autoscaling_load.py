"""The load of a pool, as autoscaling sees it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from service.pool.autoscaling_load import (
    DecayingLevel,
    DecayingRate,
    LoadMeter,
    SlotLoad,
    pool_load,
)
from service.pool.request_queue import Backlog

IDLE = Backlog(running=0, waiting=0, waiting_load=0, oldest_s=None)


@dataclass
class Clock:
    """A clock that the test moves."""

    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def served(meter: LoadMeter, clock: Clock, expert: str, *times_s: float) -> None:
    """Let requests of an expert run, one after the other."""
    for time_s in times_s:
        meter.record_arrival(expert, 1)
        with meter.run(expert, 1):
            clock.now_s += time_s


@pytest.mark.parametrize("per_s", [1, 4, 30])
def test_rate_of_even_events_is_theirs(per_s: float) -> None:
    rate = DecayingRate()
    for i in range(int(100 * per_s)):
        rate.add(1, i / per_s)
    assert rate.per_s(100) == pytest.approx(per_s, rel=0.1)
    assert rate.per_s(300) == 0


def test_offered_load_is_arrivals_times_service_time_over_places() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    for _ in range(80):
        served(meter, clock, "a", 1.0)
    slot = SlotLoad(4, {"a": IDLE, "b": IDLE}, serving=True, start_s=7)
    load = pool_load([slot], meter, clock.now_s)
    assert load.offered == {"a": pytest.approx(0.25, rel=0.1)}
    assert (load.ongoing, load.backlog_s, load.serving, load.start_s) == (0, {}, True, 7)


def test_offered_load_of_requests_that_have_not_ended_yet_is_what_runs() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    served(meter, clock, "a", 1.0)
    queue = Backlog(running=3, waiting=9, waiting_load=12, oldest_s=None)
    with meter.run("a", 3):
        clock.now_s += 60
        load = pool_load([SlotLoad(4, {"a": queue}, serving=True, start_s=1)], meter, clock.now_s)
    assert load.offered == {"a": pytest.approx(0.75, rel=0.01)}
    assert (load.ongoing, load.serving) == (15, True)
    clock.now_s += 200
    assert pool_load([SlotLoad(4, {"a": IDLE}, serving=True, start_s=1)], meter, 0).offered == {}


def test_service_time_is_a_moving_average() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    assert meter.service_s("a") is None
    served(meter, clock, "a", 1.0)
    assert meter.service_s("a") == 1
    served(meter, clock, "a", 6.0)
    assert meter.service_s("a") == pytest.approx(2)
    meter.forget("a")
    assert meter.service_s("a") is None


def test_level_is_the_average_over_time() -> None:
    level = DecayingLevel()
    for second in range(0, 200, 2):  # 4 for one second, 0 for the next
        level.add(4, second)
        level.add(-4, second + 1)
    assert level.mean(200) == pytest.approx(2, rel=0.1)
    assert level.mean(400) == 0


def test_backlog_is_the_work_that_waits_or_the_longest_wait() -> None:
    clock = Clock(now_s=100)
    meter = LoadMeter(clock)
    served(meter, clock, "a", 2.0)
    now_s = clock.now_s

    def backlog_s(oldest_s: float, *, serving: bool = True) -> float:
        queue = Backlog(running=4, waiting=6, waiting_load=6, oldest_s=oldest_s)
        slot = SlotLoad(4, {"a": queue}, serving=serving, start_s=60)
        return pool_load([slot], meter, now_s).backlog_s["a"]

    assert backlog_s(now_s - 1) == 3
    assert backlog_s(now_s - 9) == 9
    # The engine is only starting: another replica would start no sooner.
    assert backlog_s(now_s - 9, serving=False) == 3


def test_tokens_per_s_are_those_of_all_experts() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    for _ in range(600):
        clock.now_s += 0.1
        meter.record_tokens(5)
    assert pool_load([], meter, clock.now_s).tokens_per_s == pytest.approx(50, rel=0.05)
