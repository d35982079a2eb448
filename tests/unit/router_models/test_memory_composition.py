"""The composition problem against every choice counted out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeResult, milp

from router_models.memory_composition import compose
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
def test_compose_finds_the_optimum(seed: int, memory: float, budget: float) -> None:
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


def test_compose_experts_that_do_not_fit_are_reported() -> None:
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


def hard(seed: int) -> dict[str, Any]:
    """A problem that takes the solver more than one node of its tree."""
    rng = np.random.default_rng(seed)
    names = [f"e{i}" for i in range(8)]
    recipes = [Recipe("single", (name,)) for name in names]
    triples = itertools.permutations(names, 3)
    recipes += [Recipe("cascade", (a, b), (c,)) for a, b, c in triples if a < b][:40]
    return {
        "categories": [f"c{i}" for i in range(6)],
        "recipes": recipes,
        "prior": np.full(6, 1 / 6),
        "score": rng.random((6, len(recipes))),
        "cost": rng.random((6, len(recipes))),
        "sizes": {name: float(rng.integers(5, 20)) for name in names},
        "memory": 40.0,
        "budget": 0.4,
    }


@pytest.mark.parametrize("seed", range(4))
def test_compose_interrupted_search_reports_the_gap_to_the_optimum(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = hard(seed)
    best = compose(**given)
    assert best.optimal
    assert best.gap == 0

    def cut_short(*args: Any, options: dict[str, Any], **more: Any) -> Any:
        return milp(*args, options={**options, "node_limit": 1, "presolve": False}, **more)

    monkeypatch.setattr("router_models.memory_composition.milp", cut_short)
    found = compose(**given)
    assert found.score <= best.score + 1e-6
    assert found.score + found.gap >= best.score - 1e-6
    if found.score < best.score - 1e-6:
        assert not found.optimal
    assert found.optimal or found.gap > 0


def test_compose_timeout_without_a_solution_does_not_claim_that_none_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_found(*_: Any, **__: Any) -> Any:
        return OptimizeResult(x=None, status=1, message="Time limit reached.", mip_dual_bound=None)

    monkeypatch.setattr("router_models.memory_composition.milp", none_found)
    with pytest.raises(ValueError, match=r"was found in 2 s; that none exists is not proven"):
        compose(**hard(0), time_limit_s=2)
