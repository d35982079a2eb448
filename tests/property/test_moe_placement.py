"""Placement of routed experts on devices, for any loads."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.moe.expert_placement import (
    Placed,
    copied,
    exact,
    least_possible,
    linear,
    longest_first,
    round_robin,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    devices = draw(st.integers(2, 4))
    room = draw(st.integers(1, 4))
    experts = draw(st.integers(max(2, room), devices * room))
    load = np.array(
        draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts)), dtype=np.float64
    )
    return load, copied(load, devices * room - experts, devices), devices


def _whole(placed: Placed, copies: np.ndarray, devices: int) -> None:
    assert len(placed.devices) == devices
    assert len({len(held) for held in placed.devices}) == 1
    held = Counter(expert for device in placed.devices for expert in device)
    assert [held[e] for e in range(len(copies))] == copies.tolist()


@settings(max_examples=50, deadline=None)
@given(problems())
def test_placement_fills_devices_equally_within_the_bounds(
    problem: tuple[np.ndarray, np.ndarray, int],
) -> None:
    load, copies, devices = problem
    quick = longest_first(load, copies, devices)
    best = exact(load, copies, devices, time_limit_s=20)
    assert best is not None
    for placed in (quick, best):
        _whole(placed, copies, devices)
        assert placed.device_load(load).sum() == pytest.approx(load.sum())
    close = 1e-6 * max(1.0, load.sum())
    least = least_possible(load, copies, devices)
    assert least - close <= best.busiest(load) <= quick.busiest(load) + close
    if copies.max() == 1:
        assert quick.busiest(load) <= 4 / 3 * best.busiest(load) + close


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_exact_placement_equals_exhaustive_search(loads: list[int], devices: int) -> None:
    load = np.array(loads, dtype=np.float64)
    room = 6 // devices
    least = min(
        max(sum(loads[e] for e in order[d * room : (d + 1) * room]) for d in range(devices))
        for order in itertools.permutations(range(6))
    )
    best = exact(load, np.ones(6, dtype=np.int64), devices, time_limit_s=20)
    assert best is not None
    assert best.busiest(load) == pytest.approx(least, abs=1e-4)


@given(st.integers(2, 8), st.integers(1, 8))
def test_vllm_placements_are_complete(devices: int, room: int) -> None:
    experts = devices * room
    one = np.ones(experts, dtype=np.int64)
    _whole(linear(experts, devices), one, devices)
    _whole(round_robin(experts, devices), one, devices)
    assert linear(experts, devices).devices[0] == tuple(range(room))
    assert round_robin(experts, devices).devices[0] == tuple(range(0, experts, devices))


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.integers(2, 4), st.data())
def test_replicas_go_to_the_experts_with_the_highest_load(
    loads: list[int], devices: int, data: st.DataObject
) -> None:
    load = np.array(loads, dtype=np.float64)
    replicas = data.draw(st.integers(0, len(loads) * (devices - 1)))
    copies = copied(load, replicas, devices)
    assert copies.sum() == len(loads) + replicas
    assert copies.min() >= 1
    assert copies.max() <= devices
    # No copy would have helped more elsewhere.
    for given_, other in itertools.permutations(range(len(loads)), 2):
        if copies[given_] > 1 and copies[other] < devices:
            assert load[given_] / (copies[given_] - 1) >= load[other] / copies[other]


def test_impossible_placement_raises_with_the_reason() -> None:
    with pytest.raises(ValueError, match="1 device has nothing to place"):
        linear(4, 1)
    with pytest.raises(ValueError, match="5 experts can't be spread evenly over 2 devices; 1 more"):
        longest_first(np.ones(5), np.ones(5, dtype=np.int64), 2)
    with pytest.raises(ValueError, match="9 copies are too many: 4 experts on 3 devices"):
        copied(np.ones(4), 9, 3)
