"""The knapsack, compared with exhaustive search."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.pool import knapsack_solver
from service.pool.knapsack_solver import keep

SIZES = st.one_of(
    st.integers(0, 20),
    st.sampled_from([270, 270, 540, 15_000]),
    st.integers(2**28, 2**34),
)
THINGS = st.lists(
    st.tuples(st.floats(-1, 10, allow_nan=False) | st.sampled_from([0.0, 1.0, 2.0]), SIZES),
    max_size=12,
)


def best_of_all(values: list[float], sizes: list[int], capacity: int) -> float:
    best = 0.0
    for chosen in range(1 << len(values)):
        taken = [i for i in range(len(values)) if chosen >> i & 1]
        if sum(sizes[i] for i in taken) <= capacity:
            best = max(best, sum(values[i] for i in taken))
    return best


@settings(max_examples=300, deadline=None)
@given(THINGS, st.floats(0, 1.1))
def test_keep_any_input_is_the_best_subset_that_fits(
    things: list[tuple[float, int]], share: float
) -> None:
    values, sizes = [v for v, _ in things], [s for _, s in things]
    capacity = int(sum(sizes) * share)
    kept = keep(values, sizes, capacity)
    assert sum(sizes[i] for i in kept) <= capacity
    worth = sum(max(0.0, values[i]) for i in kept)
    assert worth == pytest.approx(best_of_all(values, sizes, capacity), rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 2**30), min_size=2, max_size=12), st.floats(0.1, 0.9))
def test_keep_values_proportional_to_sizes_is_the_best_subset(
    sizes: list[int], share: float
) -> None:
    values = [size / 2**20 for size in sizes]
    capacity = int(sum(sizes) * share)
    worth = sum(values[i] for i in keep(values, sizes, capacity))
    assert worth == pytest.approx(best_of_all(values, sizes, capacity), rel=1e-9)


def test_keep_everything_fits_keeps_all_whatever_the_values() -> None:
    assert keep([0.0, -1.0, 1.0], [5, 5, 5], 15) == {0, 1, 2}
    assert keep([0.0, -1.0, 1.0], [5, 5, 5], 14) == {2}
    assert keep([], [], 0) == frozenset()


def test_keep_zero_capacity_keeps_only_weightless_items() -> None:
    assert keep([1.0, 2.0], [1, 1], 0) == frozenset()
    assert keep([1.0, 2.0], [0, 1], 0) == {0}


def test_keep_equal_items_prefers_the_first() -> None:
    assert keep([1.0] * 5, [7] * 5, 21) == {0, 1, 2}


def test_keep_lists_of_different_lengths_raises() -> None:
    with pytest.raises(ValueError, match="2 values and 1 sizes"):
        keep([1.0, 2.0], [1], 1)


def test_keep_too_many_states_rounds_sizes_and_still_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many things of different sizes, all worth the same per byte: nearly as good as full."""
    chance = random.Random(1)
    sizes = [chance.randint(2**28, 2**34) for _ in range(60)]
    values = [size / 2**30 for size in sizes]
    capacity = sum(sizes) // 3
    monkeypatch.setattr(knapsack_solver, "_MOST_STATES", 8)
    kept = keep(values, sizes, capacity)
    total = sum(sizes[i] for i in kept)
    assert capacity * 0.98 <= total <= capacity
