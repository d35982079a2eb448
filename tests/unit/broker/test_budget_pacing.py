"""Shadow prices of budgets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.budget_pacing import BudgetPacer, BudgetSnapshot, upper_concave_hull

WORTH, COST = np.array([0.5, 0.9]), np.array([1.0, 11.0])
# The dear one is worth 0.4 more for 10 more: 0.04 a unit.
EVEN = 0.04


def seen(count: int) -> BudgetPacer:
    pacer = BudgetPacer()
    for _ in range(count):
        pacer.observe(WORTH, COST)
    return pacer


def test_price_with_ample_budget_is_zero() -> None:
    assert seen(20).solve(11.0) == 0
    assert BudgetPacer().solve(1.0) == 0


def test_price_with_scarce_budget_moves_requests_to_the_cheaper_recipe() -> None:
    price = seen(20).solve(1.0)
    assert price == pytest.approx(EVEN, rel=0.01)
    assert price >= EVEN
    assert seen(20).solve(0.5) >= EVEN, "and no less where nothing is cheap enough"


def test_price_reserves_the_budget_for_expected_arrivals() -> None:
    for spent, price in ((1000.0, 0.0), (2000.0, EVEN)):
        pacer = BudgetPacer()
        pacer.observe(WORTH, COST)
        pacer.reprice(BudgetSnapshot(2200.0, 0.0, 0.0, 100.0), 0.0)
        for _ in range(99):
            pacer.observe(WORTH, COST)
        # A hundred in half the time, and as many to come.
        got = pacer.reprice(BudgetSnapshot(2200.0, spent, 0.0, 100.0), 50.0)
        assert got == pytest.approx(price, rel=0.01)


def test_price_burst_at_the_start_of_a_window_is_not_taken_as_the_rate() -> None:
    pacer = seen(16)
    assert pacer.reprice(BudgetSnapshot(86_400.0, 0.0, 0.0, 86_400.0), 43_200.0) < 1.0
    pacer = seen(1)
    pacer.reprice(BudgetSnapshot(86_400.0, 0.0, 0.0, 86_400.0), 0.0)
    pacer.observe(WORTH, COST)
    assert pacer.reprice(BudgetSnapshot(86_400.0, 0.0, 0.0, 86_400.0), 1.0) == 0


def test_price_new_window_starts_a_new_arrival_count() -> None:
    pacer = seen(1)
    pacer.reprice(BudgetSnapshot(100.0, 0.0, 0.0, 100.0), 0.0)
    for _ in range(100):
        pacer.observe(WORTH, COST)
    pacer.reprice(BudgetSnapshot(100.0, 90.0, 0.0, 100.0), 50.0)
    assert pacer.price > 0
    pacer.reprice(BudgetSnapshot(100.0, 0.0, 100.0, 200.0), 150.0)
    assert pacer.price == 0, "one request in half a window, and the whole budget left"


def test_price_ignores_excluded_candidates() -> None:
    pacer = BudgetPacer()
    pacer.observe(np.array([-np.inf, 0.9]), COST)
    assert upper_concave_hull(np.array([-np.inf, -np.inf]), COST).tolist() == []
    assert pacer.solve(1.0) == pytest.approx(0, abs=1e-9), "there is only the dear one"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_price_spends_the_available_budget(seed: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    pacer = BudgetPacer()
    rows = [(draw.random(6), draw.random(6) * 10) for _ in range(200)]
    for worth, cost in rows:
        pacer.observe(worth, cost)

    def spends(price: float) -> float:
        return float(np.mean([c[(w - price * c).argmax()] for w, c in rows]))

    most, least = spends(0.0), float(np.mean([c.min() for _, c in rows]))
    each = least + share * (most - least)
    price = pacer.solve(each)
    assert spends(price) <= each + 1e-9
    assert spends(price * 0.98) >= each - 0.06 * (most - least)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_concave_hull_contains_every_candidate_a_price_would_choose(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    worth, cost = draw.random(count), draw.random(count)
    kept = set(upper_concave_hull(worth, cost).tolist())
    for price in np.geomspace(1e-3, 1e3, 40):
        assert int((worth - price * cost).argmax()) in kept
