"""Budgets of thinking, learned from lengths that earlier budgets have cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.thinking_lengths import LengthDistribution, ThinkingLengths, ThinkingWorth

LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=80)
# With such a price no more is left whole than must be.
DEAR = ThinkingWorth(0.5, 1.0)
FREE = ThinkingWorth(0.5, 0.0)


def distribution(lengths: list[int], at: int = 10**6) -> LengthDistribution:
    """What is known of lengths that a budget cuts."""
    whole = np.array(lengths, dtype=float)
    return LengthDistribution(np.minimum(whole, at), whole > at)


@given(LENGTHS, st.floats(0.05, 0.99))
def test_quantile_of_whole_lengths_is_the_plain_one(lengths: list[int], share: float) -> None:
    found = distribution(lengths).quantile(share)
    within = sum(length <= found for length in lengths) / len(lengths)
    below = sum(length < found for length in lengths) / len(lengths)
    assert within >= share - 1e-9
    assert below < share + 1e-9


@given(LENGTHS, st.integers(1, 5000), st.floats(0.05, 0.99))
def test_quantile_is_never_lowered_by_a_cut(lengths: list[int], at: int, share: float) -> None:
    plain = distribution(lengths).quantile(share)
    assert distribution(lengths, at).quantile(share) == (plain if plain <= at else 2 * at)


@given(LENGTHS, st.floats(0.05, 0.99), st.floats(0, 1), st.floats(0, 0.01))
def test_best_has_the_greatest_utility_among_all_budgets_that_leave_enough_whole(
    lengths: list[int], share: float, quality: float, price: float
) -> None:
    found = distribution(lengths).best(share, ThinkingWorth(quality, price))
    sizes = np.array(lengths, dtype=float)

    def utility(budget: float) -> float:
        return float(quality * (sizes <= budget).mean() - price * np.minimum(sizes, budget).mean())

    allowed = [b for b in {*lengths} if (sizes <= b).mean() >= share - 1e-9]
    assert utility(np.inf if found is None else found) >= max(map(utility, allowed)) - 1e-9
    if found is not None:
        assert (sizes <= found).mean() >= share - 1e-9


def test_best_cuts_what_goes_on_for_ever_and_not_what_is_long_and_ends() -> None:
    worth = ThinkingWorth(0.6, 1e-4)
    assert distribution([100] * 90 + [20_000] * 10).best(0.5, worth) == 100
    assert distribution([100] * 90 + [2000] * 10).best(0.5, worth) is None
    # A dear token ends it sooner, and a good answer is worth more tokens.
    assert distribution([100] * 90 + [2000] * 10).best(0.5, ThinkingWorth(0.6, 1e-3)) == 100
    assert distribution([100] * 90 + [20_000] * 10).best(0.95, worth) is None


@pytest.mark.parametrize("share", [0.8, 0.95])
@pytest.mark.parametrize("seed", range(2))
def test_budget_that_cuts_what_it_learns_from_does_not_shrink(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = ThinkingLengths()
    cuts = []
    for n in range(8000):
        natural = math.ceil(rng.lognormal(6, 0.8))
        budget = lengths.budget("e", "c", share, DEAR)
        cut = budget is not None and natural > budget
        lengths.observe("e", "c", min(natural, budget or natural), cut=cut)
        if n > 2000:
            cuts.append(cut)
    assert 0.4 * (1 - share) < np.mean(cuts) < 1.2 * (1 - share)
    first, last = np.array_split(np.array(cuts, dtype=float), 2)
    assert abs(first.mean() - last.mean()) < 0.3 * (1 - share)


def test_budget_of_an_easy_category_is_small_and_a_new_one_has_that_of_all() -> None:
    lengths = ThinkingLengths()
    assert lengths.budget("e", "easy", 0.9, DEAR) is None
    for n in range(60):
        lengths.observe("e", "easy", n % 10, cut=False)
        lengths.observe("e", "hard", 1000 + n, cut=False)
    found = [lengths.budget("e", name, 0.9, DEAR) for name in ("easy", "hard", "new", "")]
    assert found == [16, 1053, 1047, 1047]
    assert lengths.budget("e", "hard", 0.9, FREE) is None
    assert lengths.budget("other", "easy", 0.9, DEAR) is None
    # A rarer quantile needs more answers.
    assert lengths.budget("e", "easy", 0.99, DEAR) is None
    assert lengths.excess("e", "hard", 1030) == pytest.approx(sum(range(30)) / 60)
    assert lengths.excess("other", "hard", 5) == 0
    lengths.forget(["e"])
    assert lengths.budget("e", "hard", 0.9, DEAR) is None


def test_budget_follows_new_lengths() -> None:
    lengths = ThinkingLengths()
    for n in range(600):
        lengths.observe("e", "c", 300 if n % 10 else 400, cut=False)
    assert lengths.budget("e", "c", 0.8, DEAR) == 300
    for n in range(512):
        lengths.observe("e", "c", 50 if n % 10 else 400, cut=False)
    assert lengths.budget("e", "c", 0.8, DEAR) == 50


@pytest.mark.parametrize("cut", [False, True])
def test_lengths_of_any_size_that_an_endpoint_tells_are_kept(cut: bool) -> None:
    lengths = ThinkingLengths()
    for _ in range(60):
        lengths.observe("e", "math", 2**31, cut=cut)
    assert lengths.excess("e", "math", 0) >= 2**31 - 1
