"""What `auto` chooses by category and price, and what `coe check` warns of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.config import Config
from service.gateway.routing.quality_cost_frontier import (
    WEIGHTS,
    Frontier,
    frontier_of,
    routing_warnings,
)
from service.gateway.routing.routing_setup import RoutingSetup
from service.types import Recipe

ROOT = Path(__file__).parents[4]
DEMO = str(ROOT / "router_models" / "artifacts" / "demo@1")
LABELS = ("general", "math", "intents", "code")


def config(experts: dict[str, dict[str, Any]], **more: Any) -> Config:
    given = {name: {"model": name, **one} for name, one in experts.items()}
    pools = {"cpu": {"engine": "simulated"}}
    return Config.model_validate({"experts": given, "pools": pools, **more})


def price(value: float) -> dict[str, Any]:
    return {"price": {"prompt": value, "completion": value}}


def figures(*values: float) -> dict[str, Any]:
    return {"quality": dict(zip(LABELS, values, strict=True))}


@pytest.mark.parametrize("seed", range(20))
def test_chosen_recipes_have_the_greatest_utility_and_trade_quality_for_cost(seed: int) -> None:
    draw = np.random.default_rng(seed)
    quality, cost = draw.random((5, 7)), draw.random((5, 7))
    recipes = tuple(Recipe("single", (f"e{r}",)) for r in range(7))
    share = draw.dirichlet(np.ones(5))
    reference = draw.random(5)
    found = Frontier(tuple("abcde"), share, recipes, quality, cost, reference, True)
    seen = []
    for weight in WEIGHTS:
        at = found.chosen(float(weight))
        utility = quality - weight / reference[:, None] * cost
        assert np.allclose(utility[np.arange(5), at], utility.max(axis=1))
        seen.append((share @ quality[np.arange(5), at], share @ cost[np.arange(5), at]))
    for (better, dearer), (worse, cheaper) in itertools.pairwise(seen):
        assert better >= worse - 1e-9
        assert dearer >= cheaper - 1e-9
    assert {recipes[r] for r in quality.argmax(axis=1)} <= found.winners()


def test_frontier_of_a_config_has_its_figures_prices_and_presets() -> None:
    given = config(
        {
            "general": {**figures(0.5, 0.4, 0.1, 0.2), **price(1)},
            "big": {**figures(0.6, 0.9, 0.1, 0.7), **price(10)},
        },
        router={"artifact": DEMO},
        recipes={
            "both": {
                "kind": "cascade",
                "members": ["general"],
                "later": ["big"],
                "escalates": 0.25,
                **figures(0.55, 0.8, 0.1, 0.6),
            }
        },
    )
    found = frontier_of(given, RoutingSetup(given))
    assert found.measured
    assert set(found.categories) == set(LABELS)
    (each,) = np.unique(found.cost, axis=0)
    costs = dict(zip((recipe.name for recipe in found.recipes), each, strict=True))
    assert costs["big"] == pytest.approx(10 * costs["general"])
    assert costs["cascade([general] → big)"] == pytest.approx(3.5 * costs["general"])
    told = found.to_json(given)
    assert told["presets"]["auto"]["cost_weight"] == given.router.presets.auto.cost_weight
    assert told["prices"]["big"] == [10, 10]
    assert np.shape(told["quality"]) == np.shape(told["cost"]) == (4, 3)
    assert not told["recorded"]
    assert sum(told["share"]) == pytest.approx(1, abs=1e-3)


CASES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any], list[str]]] = {
    "one expert": ({"general": {}}, {}, []),
    "no classifier": (
        {"general": {"categories": ["general"]}, "b": {"categories": ["x"]}},
        {"router": {"artifact": "none"}},
        ["no classifier, so `auto` always means 'general'"],
    ),
    "no map": (
        {"general": {"categories": ["general"]}, "math": {"categories": ["math"]}},
        {"router": {"artifact": DEMO}},
        ["no expert map"],
    ),
    "unreached": (
        {
            "general": {"categories": ["general"], **figures(0.5, 0.5, 0.5, 0.5), **price(1)},
            "math": {**figures(0.4, 0.9, 0.4, 0.4), **price(1)},
            "worse": {**figures(0.1, 0.1, 0.1, 0.1), **price(1)},
        },
        {"router": {"artifact": DEMO}},
        ["no category reaches worse"],
    ),
    "dominant": (
        {
            "general": {"categories": ["general"], **figures(0.5, 0.5, 0.5, 0.5), **price(1)},
            "math": {**figures(0.4, 0.4, 0.4, 0.4), **price(2)},
        },
        {"router": {"artifact": DEMO}},
        ["no category reaches math", "general is chosen for every category"],
    ),
    "fallback that nothing reaches": (
        {
            "general": {"categories": ["general"], **figures(0.3, 0.3, 0.3, 0.3), **price(1)},
            "math": {**figures(0.4, 0.9, 0.4, 0.4), **price(1)},
            "code": {**figures(0.4, 0.4, 0.4, 0.9), **price(1)},
        },
        {"router": {"artifact": DEMO}},
        ["no category reaches the fallback 'general' at any price"],
    ),
    "by name only": (
        {
            "general": {"categories": ["general"], **figures(0.5, 0.5, 0.5, 0.5), **price(1)},
            "math": {**figures(0.4, 0.9, 0.4, 0.4), **price(1)},
            "worse": {"auto": False, **price(0)},
        },
        {"router": {"artifact": DEMO}},
        [],
    ),
    "cheap enough at some price": (
        {
            "general": {"categories": ["general"], **figures(0.5, 0.5, 0.5, 0.5), **price(5)},
            "cheap": {**figures(0.4, 0.4, 0.4, 0.4), **price(1)},
        },
        {"router": {"artifact": DEMO}},
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_routing_warnings_name_what_auto_can_not_do(name: str) -> None:
    experts, more, expected = CASES[name]
    given = config(experts, **more)
    lines = routing_warnings(given, RoutingSetup(given))
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert part in line
