"""The savings ledger: exact where the answer is known, and the sums of the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.cost_model import CostModel
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.savings import (
    Comparison,
    RecipeEstimates,
    Saving,
    SavingsModel,
    best_baseline,
    is_saving,
    totals,
)
from service.broker.token_prices import Price
from service.types import MAX_LATER, Recipe

CASCADE = Recipe("cascade", ("small",), ("large",))
CATALOG = RecipeCatalog(("small", "large"), [CASCADE])
PRICES = {"small": Price(1.0, 2.0), "large": Price(10.0, 40.0)}


def compared(
    answered: str, against: tuple[str, ...] = ("large",), *, learned: int = 100, **given: Any
) -> Comparison | None:
    model = CostModel(CATALOG.experts, ("math",), PRICES)
    for _ in range(400):
        model.observe("large", "math", learned)
        model.observe("small", "math", learned // 2)
    named = {**CATALOG.index, "both": CATALOG.recipe_index[CASCADE]}
    reach = np.zeros((3, MAX_LATER))
    reach[2, 0] = 0.25
    estimates = RecipeEstimates(
        np.array([0.6, 0.8, 0.75]), reach, np.array(given.pop("possible", [True, True, True]))
    )
    asked: dict[str, Any] = {
        "category": "math",
        "prompt_tokens": 1000,
        "most_tokens": None,
        "answers": 1,
        "added_tokens": 0,
        "max_cost": None,
        **given,
    }
    return SavingsModel(CATALOG, model, against, named).compare(
        named[answered], "small" if answered == "both" else answered, estimates, **asked
    )


@pytest.mark.parametrize(
    ("against", "given", "expected"),
    [
        # 2,000 prompt tokens at 10 and 100 answer tokens at 40, per million.
        ("large", {}, 0.02 + 0.004),
        ("large", {"most_tokens": 10}, 0.02 + 0.0004),
        ("large", {"answers": 3}, 0.02 + 0.012),
        # The expert that answered counted 7 tokens of a system prompt; large has one of 500.
        ("large", {"added_tokens": np.array([7.0, 500.0])}, 0.02493 + 0.004),
        # small always and large in a quarter of the cases.
        ("both", {}, 0.002 + 0.0001 + 0.25 * 0.024),
    ],
)
def test_settle_prices_the_baseline_by_counted_prompt_and_learned_length(
    against: str, given: dict[str, Any], expected: float
) -> None:
    found = compared("small", (against,), **given)
    assert found is not None
    (saving,) = found.settle(2000, 0.003)
    assert saving.baseline_cost == pytest.approx(expected, rel=0.02)
    assert saving.cost == 0.003
    assert saving.quality == 0.6


def test_settle_of_the_baseline_itself_saves_exactly_nothing() -> None:
    found = compared("large", ("large", "small"))
    assert found is not None
    same, other = found.settle(2000, 0.5)
    assert (same.baseline_cost, same.baseline_quality) == (same.cost, same.quality)
    assert other.baseline_cost < other.cost, "a cheaper baseline shows what was paid for quality"
    assert other.quality > other.baseline_quality


@pytest.mark.parametrize(
    "given",
    [{"possible": [True, False, True]}, {"max_cost": 0.001}, {"against": ()}],
)
def test_compare_without_a_baseline_that_could_answer_counts_nothing(given: dict[str, Any]) -> None:
    assert compared("small", **given) is None


costs = st.integers(0, 10**9).map(lambda millionths: millionths / 1e6)
qualities = st.integers(0, 10**6).map(lambda millionths: millionths / 1e6)
BASELINES = st.sampled_from(["large", "a/b", "cascade([a] -> b)"])
SAVINGS = st.builds(
    Saving,
    st.sampled_from(["large", "a/b", "cascade([a] -> b)"]),
    costs,
    costs,
    qualities,
    qualities,
)


@given(st.lists(SAVINGS, max_size=30))
def test_totals_of_counts_are_the_sums_of_what_was_counted(savings: list[Saving]) -> None:
    store: dict[str, int] = {"requests": 3, "large/requests": 2, "large/cost_micro": 5}
    for saving in savings:
        for name, count in saving.counts().items():
            assert is_saving(name)
            assert count >= 0
            store[name] = store.get(name, 0) + count
    found = totals([store])
    assert set(found) == {saving.baseline for saving in savings}
    for name, total in found.items():
        mine = [saving for saving in savings if saving.baseline == name]
        assert total.requests == len(mine)
        assert total.cost == pytest.approx(sum(saving.cost for saving in mine))
        assert total.to_json()["saved_cost"] == pytest.approx(
            sum(saving.baseline_cost - saving.cost for saving in mine), abs=1e-5
        )
        assert total.to_json()["quality_gain"] == pytest.approx(
            np.mean([saving.quality - saving.baseline_quality for saving in mine]), abs=1e-5
        )


def test_best_baseline_is_the_best_mean_among_the_able() -> None:
    quality = np.array([[0.9, 0.6, 1.0], [0.1, 0.6, 1.0]])
    assert best_baseline(quality, np.array([True, True, False])) == 1
    assert best_baseline(quality, np.array([False, False, False])) is None
