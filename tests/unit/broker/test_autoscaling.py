"""Decisions of autoscaling: signals, bounds, delays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.broker.autoscaling import (
    Load,
    ScalingPolicy,
    ScalingState,
    busy_replicas,
    desired_replicas,
    required_replicas,
)

POLICY = ScalingPolicy(
    min_replicas=1, max_replicas=8, target_ongoing_requests=10, upscale_factor=100
)
WAIT = replace(POLICY, target_ongoing_requests=None, target_wait_s=2.0)


def decided(
    policy: ScalingPolicy, loads: list[tuple[float, Load]], target: int, *, follow: bool = True
) -> list[int]:
    """The targets after loads at given times, where replicas serve as soon as they are wanted."""
    state, targets = ScalingState(), []
    for now_s, load in loads:
        now = replace(load, serving=target) if follow else load
        target, state = desired_replicas(now, policy, state, target=target, now_s=now_s)
        targets.append(target)
    return targets


@pytest.mark.parametrize(
    ("policy", "load", "required"),
    [
        (POLICY, Load(ongoing=25), 2.5),
        (replace(POLICY, target_tokens_per_s=100), Load(ongoing=25, tokens_per_s=700), 7),
        # Utilization alone adds none, unless a wait is aimed at.
        (POLICY, Load(ongoing=1, offered={"a": 3.2}), 0.1),
        (WAIT, Load(offered={"a": 3.2}), 4),
        # A short backlog is left to the replicas that there are.
        (WAIT, Load(offered={"a": 0.8}, backlog_s={"a": 4.0}, serving=2), 1),
        (WAIT, Load(offered={"a": 0.8}, backlog_s={"a": 30}, serving=2), 2.8),
        (WAIT, Load(offered={"a": 0.8}, backlog_s={"a": 4.1}, serving=2), 0.8 + 4.1 / 15),
        # Nobody starts a replica of 60 s for what is served in 60 s.
        (WAIT, Load(offered={"a": 0.8}, backlog_s={"a": 30}, serving=2, start_s=60), 1.3),
    ],
)
def test_required_replicas_is_that_of_the_largest_signal(
    policy: ScalingPolicy, load: Load, required: float
) -> None:
    assert required_replicas(load, policy) == pytest.approx(required)


@pytest.mark.parametrize(
    ("by_expert", "engines", "replicas"),
    [
        ({}, 4, 0),
        ({"a": 2.0}, 1, 2),
        ({"a": 2.0, "b": 1.0}, 1, 3),
        ({"a": 2.0, "b": 1.0}, 2, 2),  # one expert has one engine in a replica
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 2, 1.5),
    ],
)
def test_busy_replicas_follow_the_hottest_expert_and_the_engines(
    by_expert: dict[str, float], engines: int, replicas: float
) -> None:
    assert busy_replicas(by_expert, engines) == replicas


def test_desired_replicas_wait_for_the_upscale_delay() -> None:
    policy = replace(POLICY, upscale_delay_s=2)
    high, low = Load(ongoing=35), Load(ongoing=5)
    assert decided(policy, [(0, high), (1, high), (1.9, high), (2, high)], 1) == [1, 1, 1, 4]
    # A load that goes away meanwhile begins anew.
    assert decided(policy, [(0, high), (1, low), (2, high), (2.9, high), (3, high)], 1) == [
        *(1, 1, 1, 1),
        4,
    ]


def test_desired_replicas_stay_for_the_highest_load_within_the_downscale_delay() -> None:
    policy = replace(POLICY, downscale_delay_s=10)
    loads = [(0.0, Load(ongoing=45)), (4.0, Load(ongoing=22)), (9.0, Load(ongoing=5))]
    assert decided(policy, [*loads, (9.9, Load(ongoing=5)), (10, Load(ongoing=5))], 5)[-2:] == [
        *(5,),
        3,
    ]
    assert decided(policy, [*loads, (14, Load(ongoing=5))], 5)[-1] == 1


def test_desired_replicas_are_kept_where_the_others_would_be_too_busy() -> None:
    # Both are full. By the number of requests, one would do.
    full = Load(ongoing=9, offered={"a": 1.9})
    assert decided(POLICY, [(0, full), (100, full)], 3) == [3, 3]
    half = Load(ongoing=9, offered={"a": 0.7})
    assert decided(POLICY, [(0, half)], 3) == [1]
    # One of 20 places is no reason to remove what the next request would bring back.
    assert decided(POLICY, [(0, Load(ongoing=20))], 3) == [3]
    assert decided(POLICY, [(0, Load(ongoing=18))], 3) == [2]


def test_desired_replicas_grow_by_the_replicas_that_serve() -> None:
    policy = replace(POLICY, upscale_factor=2.0)
    spike = Load(ongoing=80, serving=0)
    assert decided(policy, [(0, spike), (1, spike)], 1, follow=False) == [1, 1]
    spike = replace(spike, serving=1)
    assert decided(policy, [(0, spike), (1, spike)], 1, follow=False) == [2, 2]
    assert decided(policy, [(i, spike) for i in range(4)], 1) == [2, 4, 8, 8]
    # Arrivals don't become more while replicas start, so they are believed at once.
    policy = replace(WAIT, upscale_factor=2.0)
    arriving = Load(offered={"a": 4.0}, backlog_s={"a": 5.0}, serving=1)
    assert decided(policy, [(0, arriving), (1, arriving)], 1, follow=False) == [5, 5]


def test_desired_replicas_from_zero_wait_for_nothing() -> None:
    policy = replace(POLICY, min_replicas=0, upscale_delay_s=60)
    assert decided(policy, [(0, Load()), (1, Load(held=True)), (1.1, Load(held=True))], 0) == [
        *(0, 1),
        1,
    ]


def test_desired_replicas_fall_to_zero_after_the_last_request() -> None:
    policy = replace(POLICY, min_replicas=0, downscale_delay_s=5, downscale_to_zero_delay_s=20)
    loads = [(0.0, Load(ongoing=15)), *((float(s), Load()) for s in range(1, 22))]
    targets = decided(policy, loads, 2)
    assert [targets.index(n) for n in (2, 1, 0)] == [0, 5, 20]
    # Offered load of requests that have ended keeps none, a request that waits does.
    assert decided(policy, [(0, Load(offered={"a": 0.4})), (20, Load(offered={"a": 0.1}))], 1) == [
        *(1,),
        0,
    ]
    assert decided(policy, [(0, Load()), (19, Load(held=True)), (21, Load())], 1) == [1, 1, 1]
    assert decided(replace(policy, min_replicas=1), [(0, Load()), (99, Load())], 1) == [1, 1]


@pytest.mark.parametrize("serving", [0, 1, 9])
@pytest.mark.parametrize(
    "extreme",
    [
        {"upscale_factor": float("inf")},
        {"upscale_factor": 1e308},
        {"target_ongoing_requests": 5e-324},
        {"target_tokens_per_s": 5e-324},
        {"target_utilization": 5e-324, "target_wait_s": 5e-324},
    ],
)
def test_extreme_policy_asks_for_a_number_within_its_bounds(
    serving: int, extreme: dict[str, Any]
) -> None:
    policy = ScalingPolicy(**({"max_replicas": 10, "target_ongoing_requests": 1.0} | extreme))
    load = Load(
        ongoing=5, tokens_per_s=5, offered={"a": 2.0}, backlog_s={"a": 9.0}, serving=serving
    )
    wanted, _ = desired_replicas(load, policy, ScalingState(), target=1, now_s=1.0)
    assert 1 <= wanted <= 10
