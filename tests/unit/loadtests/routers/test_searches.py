"""Searching the load of a gateway: it ends, at the best within bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loadtests.routers.searches import (
    MOST_IN_FLIGHT,
    Load,
    best_load,
    largest_passed,
    next_in_flight,
    next_level,
)

LEVELS = (16, 32, 64, 128, 256)


def _search(gateway: Callable[[int], Load]) -> list[Load]:
    tried: list[Load] = []
    while (in_flight := next_in_flight(tried)) is not None:
        tried.append(gateway(in_flight))
        assert len(tried) < 20
    return tried


def _saturating(most_per_s: float) -> Callable[[int], Load]:
    """20 ms upstream, and a queue beyond `most_per_s`."""

    def gateway(in_flight: int) -> Load:
        rate = min(in_flight / 0.02, most_per_s)
        return Load(in_flight, rate, 1000 * in_flight / rate, 0.0)

    return gateway


@pytest.mark.parametrize(
    ("most_per_s", "in_flight"),
    [(30, 16), (700, 16), (900, 32), (12_000, 256), (1e9, MOST_IN_FLIGHT)],
)
def test_search_of_a_saturating_gateway_finds_where_it_saturates(
    most_per_s: float, in_flight: int
) -> None:
    tried = _search(_saturating(most_per_s))
    best = best_load(tried)
    assert best is not None
    assert best.in_flight == in_flight
    assert best.replies_per_s == min(most_per_s, MOST_IN_FLIGHT / 0.02)


@pytest.mark.parametrize("most", [1, 2, 5, 15])
def test_search_of_a_gateway_that_is_slow_halves_until_it_is_within(most: int) -> None:
    tried = _search(lambda n: Load(n, 10.0, 900.0 if n <= most else 1100.0, 0.0))
    best = best_load(tried)
    assert best is not None
    assert best.in_flight == max(n for n in (16, 8, 4, 2, 1) if n <= most)


@pytest.mark.parametrize(
    "outside", [Load(16, 50.0, 1000.0, 0.0), Load(16, 50.0, 10.0, 0.001), Load(16, 0.0, 1e9, 1.0)]
)
def test_search_of_a_gateway_never_within_ends_without_a_load(outside: Load) -> None:
    tried = _search(lambda n: Load(n, outside.replies_per_s, outside.p99_ms, outside.errors))
    assert [load.in_flight for load in tried] == [16, 8, 4, 2, 1]
    assert best_load(tried) is None


def test_search_stops_where_the_bounds_are_left() -> None:
    tried = _search(lambda n: Load(n, 10.0 * n, 10.0, 0.5 if n > 64 else 0.0))
    assert [load.in_flight for load in tried] == [16, 32, 64, 128]
    best = best_load(tried)
    assert best is not None
    assert best.in_flight == 64


def test_search_goes_on_after_one_disturbed_load() -> None:
    rates = {16: 800.0, 32: 790.0, 64: 3000.0, 128: 3010.0, 256: 3020.0}
    tried = _search(lambda n: Load(n, rates[n], 10.0, 0.0))
    assert [load.in_flight for load in tried] == list(rates)


@pytest.mark.parametrize("sustained", [0, *LEVELS])
def test_bisection_finds_the_largest_level_and_tries_the_middle_first(sustained: int) -> None:
    passed: dict[int, bool] = {}
    while (level := next_level(LEVELS, passed)) is not None:
        assert level not in passed
        passed[level] = level <= sustained
    assert next(iter(passed)) == 64
    assert len(passed) <= 3
    assert largest_passed(passed) == sustained


def test_bisection_without_levels_ends() -> None:
    assert next_level((), {}) is None
    assert largest_passed({}) == 0
