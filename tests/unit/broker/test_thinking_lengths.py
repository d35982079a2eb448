"""Budgets of thinking, learned from lengths that earlier budgets have cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.thinking_lengths import ThinkingLengths, product_limit_quantile

LENGTHS = st.lists(st.integers(0, 5000), min_size=1, max_size=80)


@given(LENGTHS, st.floats(0.05, 0.99))
def test_quantile_of_whole_lengths_is_the_plain_one(lengths: list[int], share: float) -> None:
    found = product_limit_quantile(
        np.array(lengths, dtype=float), np.zeros(len(lengths), dtype=bool), share
    )
    within = sum(length <= found for length in lengths) / len(lengths)
    below = sum(length < found for length in lengths) / len(lengths)
    assert within >= share - 1e-9
    assert below < share + 1e-9


@given(LENGTHS, st.integers(1, 5000), st.floats(0.05, 0.99))
def test_quantile_is_never_lowered_by_a_cut(lengths: list[int], at: int, share: float) -> None:
    whole = np.array(lengths, dtype=float)
    plain = product_limit_quantile(whole, np.zeros(len(whole), dtype=bool), share)
    cut = product_limit_quantile(np.minimum(whole, at), whole > at, share)
    assert cut == (plain if plain <= at else 2 * at)


@pytest.mark.parametrize("quantile", [0.8, 0.95])
@pytest.mark.parametrize("seed", range(2))
def test_budget_that_cuts_what_it_learns_from_does_not_shrink(quantile: float, seed: int) -> None:
    """Nor does it grow: about as many thoughts are cut as the quantile says, for ever."""
    rng = np.random.default_rng(seed)
    lengths = ThinkingLengths()
    cuts = []
    for n in range(8000):
        natural = math.ceil(rng.lognormal(6, 0.8))
        budget = lengths.budget("e", "c", quantile)
        cut = budget is not None and natural > budget
        lengths.observe("e", "c", min(natural, budget or natural), cut=cut)
        if n > 2000:
            cuts.append(cut)
    assert 0.4 * (1 - quantile) < np.mean(cuts) < 1.3 * (1 - quantile)
    # The last budgets are no smaller than the first ones.
    first, last = np.array_split(np.array(cuts, dtype=float), 2)
    assert abs(first.mean() - last.mean()) < 0.3 * (1 - quantile)


def test_budget_of_an_easy_category_is_small_and_a_new_one_has_that_of_all() -> None:
    lengths = ThinkingLengths()
    assert lengths.budget("e", "easy", 0.9) is None
    for n in range(60):
        lengths.observe("e", "easy", n % 10, cut=False)
        lengths.observe("e", "hard", 1000 + n, cut=False)
    easy, hard = lengths.budget("e", "easy", 0.9), lengths.budget("e", "hard", 0.9)
    assert (easy, hard) == (16, 1053)
    assert lengths.budget("e", "new", 0.9) == lengths.budget("e", "", 0.9) == 1047
    assert lengths.budget("other", "easy", 0.9) is None
    # A rarer quantile needs more answers.
    assert lengths.budget("e", "easy", 0.99) is None
    assert lengths.excess("e", "hard", 1030) == pytest.approx(sum(range(30)) / 60)
    assert lengths.excess("other", "hard", 5) == 0
    lengths.forget(["e"])
    assert lengths.budget("e", "hard", 0.9) is None


def test_budget_follows_new_lengths() -> None:
    lengths = ThinkingLengths()
    for n in range(1000):
        lengths.observe("e", "c", 100 if n < 400 else 300, cut=False)
    assert lengths.budget("e", "c", 0.9) == 300
    for _ in range(512):
        lengths.observe("e", "c", 50, cut=False)
    assert lengths.budget("e", "c", 0.9) == 50
