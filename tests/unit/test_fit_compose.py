"""The composition problem against every choice counted out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from router_models.compose import compose
from service.types import Recipe

RECIPES = [
    Recipe("single", ("a",)),
    Recipe("single", ("b",)),
    Recipe("single", ("c",)),
    Recipe("cascade", ("a", "b"), ("c",)),
]
SIZES = {"a": 1.0, "b": 2.0, "c": 5.0}
CATEGORIES = ("x", "y", "z")


def by_hand(
    prior: np.ndarray, score: np.ndarray, cost: np.ndarray, memory: float, budget: float
) -> float:
    best = -1.0
    for choice in itertools.product(range(len(RECIPES)), repeat=len(CATEGORIES)):
        held = {e for r in choice for e in RECIPES[r].experts}
        at = np.arange(len(CATEGORIES)), np.array(choice)
        if sum(SIZES[e] for e in held) <= memory and float(prior @ cost[at]) <= budget:
            best = max(best, float(prior @ score[at]))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("memory", "budget"), [(np.inf, np.inf), (3, np.inf), (6, 4.0), (8, 2.0)])
def test_it_is_the_optimum(seed: int, memory: float, budget: float) -> None:
    rng = np.random.default_rng(seed)
    score, cost = rng.random((3, 4)), rng.random((3, 4)) * 3
    prior = rng.dirichlet(np.ones(3))
    found = compose(
        categories=CATEGORIES,
        recipes=RECIPES,
        prior=prior,
        score=score,
        cost=cost,
        sizes=SIZES,
        memory=memory,
        budget=budget,
    )
    assert found.score == pytest.approx(by_hand(prior, score, cost, memory, budget), abs=1e-6)
    assert found.memory <= memory
    assert found.cost <= budget + 1e-9
    assert set(found.recipes) == set(CATEGORIES)


def test_what_does_not_fit_is_said() -> None:
    ones = np.ones((3, 4))
    common = {
        "categories": CATEGORIES,
        "recipes": RECIPES,
        "prior": np.ones(3) / 3,
        "score": ones,
        "cost": ones,
    }
    with pytest.raises(ValueError, match="no choice of experts fits"):
        compose(**common, sizes=SIZES, memory=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no size is given for c"):
        compose(**common, sizes={"a": 1, "b": 1})  # type: ignore[arg-type]
