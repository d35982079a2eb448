"""What `loadtests.autoscale` makes of what it saw."""

from __future__ import annotations

import pytest

from loadtests.autoscale import Answer, Phase, Run, settings, turns
from service.config import Config


@pytest.mark.parametrize(
    ("rate", "ideal"), [(0, 0), (0.5, 1), (3.2, 1), (3.3, 2), (8, 3), (1000, 5)]
)
def test_ideal_replicas_bear_the_rate_at_the_aimed_utilization(rate: float, ideal: int) -> None:
    assert Phase("x", 1, rate).ideal == ideal


def test_turns_count_changes_of_direction() -> None:
    assert turns([1, 1, 2, 3, 3]) == 0
    assert turns([1, 3, 2, 2, 1]) == 1
    assert turns([1, 2, 1, 2]) == 2


def test_replica_seconds_are_the_time_of_all_replicas() -> None:
    looks = [(0.0, 0), (1.0, 2), (3.0, 1), (4.0, 0)]
    run = Run(0, "", session=None, looks=looks)  # type: ignore[arg-type]
    assert run.replica_seconds(0, 10) == 5
    assert run.between(1, 4) == [2, 1]


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (Answer(0, 3, seen=3), True),
        (Answer(0, 3, seen=2), False),
        (Answer(0, 3, seen=3, fault="the stream has no end"), False),
    ],
)
def test_answer_is_whole_with_all_tokens_and_no_fault(answer: Answer, *, whole: bool) -> None:
    assert answer.whole == whole


def test_settings_are_a_config_that_scales_from_zero() -> None:
    pool = Config.model_validate(settings(8000, 15)).pools["main"]
    assert (pool.min_replicas, pool.scales, pool.scaling.target_wait_s) == (0, True, 1)
