"""Learned costs of lines: nothing before an answer, then the level, recipes, categories, slopes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.line_costs import cost_ratios, features

LINES, RECIPES = 400, 3


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    quality = rng.uniform(0, 1, (LINES, RECIPES))
    tokens = rng.uniform(50, 500, (LINES, RECIPES))
    return features(quality, tokens), rng.integers(0, 4, LINES), rng


def test_features_of_equal_lines_are_zero_and_of_others_standardised() -> None:
    given_features, _, _ = batch()
    assert given_features.mean(axis=0) == pytest.approx(np.zeros(RECIPES + 1))
    assert given_features.std(axis=0) == pytest.approx(np.ones(RECIPES + 1))
    alike = features(np.full((5, 2), 0.3), np.full((5, 2), 7.0))
    assert not alike.any()


def test_cost_ratios_without_an_answer_are_one() -> None:
    given_features, category, _ = batch()
    none = np.zeros(0, dtype=np.intp)
    found = cost_ratios(given_features, category, RECIPES, none, none, np.zeros(0))
    assert (found == 1).all()


@pytest.mark.parametrize("kind", ["level", "recipe", "category", "slope"])
def test_cost_ratios_learn_what_answers_depend_on(kind: str) -> None:
    given_features, category, rng = batch()
    true = np.ones((LINES, RECIPES))
    if kind == "level":
        true *= 2.0
    elif kind == "recipe":
        true *= [0.5, 1.0, 1.8]
    elif kind == "category":
        true *= (0.6 + 0.4 * category)[:, None]
    else:
        true *= (1 + 0.3 * given_features[:, :1]).clip(0.2)
    lines = rng.permutation(LINES)[:300]
    chosen = rng.integers(0, RECIPES, 300)
    seen = true[lines, chosen] * rng.lognormal(-0.08, 0.4, 300)
    found = cost_ratios(given_features, category, RECIPES, lines, chosen, seen)
    others = np.setdiff1d(np.arange(LINES), lines)
    before = np.abs(true - 1)[others].mean()
    assert np.abs(found - true)[others].mean() < 0.45 * before


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_cost_ratios_of_any_answers_are_finite_and_bounded(seed: int, count: int) -> None:
    given_features, category, rng = batch(seed)
    lines, chosen = rng.integers(0, LINES, count), rng.integers(0, RECIPES, count)
    seen = rng.choice([0.0, 1e-9, 1.0, 1e6, 1e300], count)
    found = cost_ratios(given_features, category, RECIPES, lines, chosen, seen)
    assert found.shape == (LINES, RECIPES)
    assert ((found >= 0.05) & (found <= 50)).all()


def test_cost_ratios_few_answers_of_one_recipe_move_the_others_less() -> None:
    given_features, category, _ = batch()
    lines, chosen = np.arange(12), np.zeros(12, dtype=np.intp)
    found = cost_ratios(given_features, category, RECIPES, lines, chosen, np.full(12, 2.0))
    means = found.mean(axis=0)
    assert means[0] > means[1] > 1.1
    assert means[1] == pytest.approx(means[2])
