"""The direct estimate, and how far categories are trusted: on made-up outcomes."""

from __future__ import annotations

import numpy as np
import pytest

from router_models.expert_map_fit import choose_trust_power, loadings
from router_models.fit_settings import Settings
from router_models.recipe_replay import RecipeResults
from service.types import MAX_LATER, Recipe

SETTINGS = Settings()
NEVER = SETTINGS.slope_penalties[0]


def test_loadings_find_what_made_the_scores_beside_missing_ones() -> None:
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(4000, 3))
    true = rng.normal(size=(3, 5))
    score = 0.5 + factors @ true
    score[rng.random(score.shape) < 0.1] = np.nan
    # A missing score counts as the mean, so a tenth of each loading is lost.
    assert loadings(score, factors) == pytest.approx(0.9 * true, abs=0.08)


def test_loadings_no_factor_has_none() -> None:
    assert loadings(np.ones((4, 2)), np.zeros((4, 0))).shape == (0, 2)


def results(score: np.ndarray) -> RecipeResults:
    recipes = tuple(Recipe("single", (f"e{i}",)) for i in range(score.shape[1]))
    reach = np.zeros((*score.shape, MAX_LATER), dtype=np.float32)
    return RecipeResults(recipes, score, np.ones_like(score), reach)


@pytest.mark.parametrize("categories_know", [True, False])
def test_choose_trust_power_keeps_trust_where_only_categories_know(categories_know: bool) -> None:
    """The category or the factor says which of two experts is right; the posterior is doubtful."""
    rng = np.random.default_rng(1)
    category = rng.integers(0, 2, 3000)
    factor = rng.choice([-1.0, 1.0], 3000)
    first = category == 0 if categories_know else factor > 0
    score = np.stack([first, ~first], axis=1).astype(float)
    posterior = np.where(np.eye(2)[category] > 0, 0.6, 0.4)
    # Where categories know, the direct estimate was taught noise.
    true = factor[:, None] if not categories_know else rng.normal(size=(3000, 1))
    seen = factor[:, None] * (1.0 if not categories_know else 100.0)
    power = choose_trust_power(
        results(score), category, posterior, seen, true, NEVER, SETTINGS, SETTINGS.trust_powers
    )
    assert (power == 0.0) == categories_know
    assert power == 0.0 or power == max(SETTINGS.trust_powers)


def test_choose_trust_power_works_with_missing_scores_and_few_rows() -> None:
    score = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, 1.0]])
    power = choose_trust_power(
        results(score),
        np.array([0, 1, 0]),
        np.full((3, 2), 0.5),
        np.zeros((3, 1)),
        np.zeros((3, 1)),
        NEVER,
        SETTINGS,
        SETTINGS.trust_powers,
    )
    assert power in SETTINGS.trust_powers
