"""Estimates from rows of outcomes, and from an artifact's map."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models.composition.recipe_estimates import (
    GENERAL,
    SHRINKAGES,
    Estimates,
    choose_shrinkage,
    estimate,
    from_map,
    only,
    with_alternatives,
    with_named_recipes,
)
from router_models.fit_settings import Settings
from router_models.outcome_reader import OutcomeError, Table, read_outcomes
from router_models.recipe_replay import candidates
from service.classifier.expert_map import ExpertMap
from service.types import MAX_LATER, Deliberation, Recipe, Recruitment

COSTS = {"a": 1.0, "b": 2.0, "c": 8.0}
SETTINGS = Settings(shrink_rows=2.0)


def table(tmp_path: Path, rows: list[dict[str, Any]]) -> Table:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": str(i), "prompt": f"p{i}", **row}) for i, row in enumerate(rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return read_outcomes([file], COSTS)[0]


def row(category: str | None, **scores: float) -> dict[str, Any]:
    outcomes = {name: {"score": score} for name, score in scores.items()}
    return {"outcomes": outcomes} | ({"category": category} if category else {})


def quality(found: Estimates, category: str, recipe: str) -> float:
    names = [one.name for one in found.recipes]
    return float(found.quality[found.categories.index(category), names.index(recipe)])


def test_estimate_means_are_shrunk_toward_the_overall_mean(tmp_path: Path) -> None:
    rows = [row("x", a=1, b=0), row("x", a=1, b=0), row("y", a=0, b=1), row(None, a=1, b=1)]
    found = estimate(table(tmp_path, rows), settings=SETTINGS)
    assert found.categories == ("x", "y")
    # Rows without a category count for the overall mean, here 3/4.
    assert quality(found, "x", "a") == pytest.approx((2 + 2 * 0.75) / 4)
    assert quality(found, "y", "a") == pytest.approx((0 + 2 * 0.75) / 3)
    assert found.share == pytest.approx([2 / 3, 1 / 3])
    assert found.rows == pytest.approx([2, 1])


def test_estimate_category_without_outcomes_has_the_overall_means(tmp_path: Path) -> None:
    rows = [row("x", a=1, b=0), row("y", a=0, b=1)]
    traffic = {"new": 3.0, "x": 1.0}
    found = estimate(table(tmp_path, rows), traffic, SETTINGS)
    assert set(found.categories) == {"new", "x", "y"}
    assert quality(found, "new", "a") == pytest.approx(0.5)
    share = dict(zip(found.categories, found.share, strict=True))
    assert share == pytest.approx({"new": 0.75, "x": 0.25, "y": 0.0})


def test_estimate_without_any_category_has_one(tmp_path: Path) -> None:
    found = estimate(table(tmp_path, [row(None, a=1), row(None, a=0)]), settings=SETTINGS)
    assert found.categories == (GENERAL,)
    assert found.share == pytest.approx([1.0])
    assert quality(found, GENERAL, "a") == pytest.approx(0.5)


@pytest.mark.parametrize("traffic", [{"x": 0.0}, {"x": -1.0}])
def test_estimate_empty_traffic_raises(tmp_path: Path, traffic: Mapping[str, float]) -> None:
    with pytest.raises(OutcomeError, match="the traffic is empty"):
        estimate(table(tmp_path, [row("x", a=1)]), traffic)


def test_estimate_reach_of_a_cascade_is_how_often_its_later_expert_was_asked(
    tmp_path: Path,
) -> None:
    def answered(a: str, b: str, c: str) -> dict[str, Any]:
        given = {"a": a, "b": b, "c": c}
        right = {name: {"score": int(x == "R"), "answer": x} for name, x in given.items()}
        return {"category": "x", "outcomes": right}

    # a and b agree on half of the rows, and are right there.
    rows = [answered("R", "R", "R"), answered("W", "V", "R")] * 10
    found = estimate(table(tmp_path, rows), settings=SETTINGS)
    names = [one.name for one in found.recipes]
    at = names.index("cascade([a, b] → c)")
    assert found.reach[0, at, :3] == pytest.approx([1.0, 1.0, 0.5])
    assert found.quality[0, at] == pytest.approx(1.0)
    assert found.cost[0, at] == pytest.approx(3.0 + 0.5 * 8.0)


@pytest.mark.parametrize(("spread", "strong"), [(0.0, True), (0.35, False)])
def test_choose_shrinkage_is_strong_where_categories_say_nothing(
    spread: float, strong: bool
) -> None:
    draw = np.random.default_rng(1)
    label = draw.integers(0, 6, 1200)
    chance = np.clip(0.5 + spread * draw.choice([-1, 1], (6, 8)), 0, 1)
    score = (draw.random((1200, 8)) < chance[label]).astype(float)
    score[draw.random(score.shape) < 0.1] = np.nan
    chosen = choose_shrinkage(score, label, 6)
    assert chosen == (SHRINKAGES[-1] if strong else SHRINKAGES[0])
    assert choose_shrinkage(score[:20], label[:20], 6) == Settings().shrink_rows


def test_only_keeps_the_recipes_of_these_experts(tmp_path: Path) -> None:
    found = only(estimate(table(tmp_path, [row("x", a=1, b=0, c=1)])), ["a", "c"])
    assert [one.name for one in found.recipes] == ["a", "c"]
    assert found.quality.shape == found.cost.shape == (1, 2)


def test_with_alternatives_copies_outcomes_at_the_alternatives_cost(tmp_path: Path) -> None:
    given = table(tmp_path, [row("x", a=1, b=0), row("y", a=0, b=1)])
    found = with_alternatives(given, {"a4": "a", "b": "a"}, {"a": 2.0, "a4": 1.0, "b": 2.0})
    assert found.experts == ("a", "b", "a4")
    assert found.score[:, 2].tolist() == given.score[:, 0].tolist()
    assert found.score[:, 1].tolist() == given.score[:, 1].tolist()  # its own outcomes stand
    assert found.cost[:, 2].tolist() == [0.5, 0.5]
    with pytest.raises(OutcomeError, match="no row has an outcome of 'z'"):
        with_alternatives(given, {"z4": "z"}, {"z4": 1.0})


def test_from_map_reads_the_map_and_averages_for_other_categories() -> None:
    recipes = (Recipe("single", ("a",)), Recipe("cascade", ("a",), ("b",)))
    reach = np.zeros((2, 2, MAX_LATER))
    reach[:, 1, 0] = [0.2, 0.6]
    found = from_map(
        ExpertMap(
            categories=("x", "y"),
            recipes=recipes,
            prior=np.array([0.75, 0.25]),
            score=np.array([[0.4, 0.6], [0.8, 0.9]]),
            count=np.ones((2, 2)),
            cost=np.array([[1.0, 2.0], [1.0, 3.0]]),
            reach=reach,
            score_slope=np.zeros((2, 0, 2)),
            cost_slope=np.zeros((2, 0, 2)),
            max_novelty=0.5,
        ),
        {"new": 1.0, "y": 1.0},
    )
    assert found.categories == ("new", "x", "y")
    assert found.share == pytest.approx([0.5, 0.0, 0.5])
    assert found.quality[0] == pytest.approx([0.5, 0.675])
    assert found.cost[0] == pytest.approx([1.0, 2.25])
    assert found.reach[0, 1] == pytest.approx([1.0, 0.3])
    assert found.reach[2, 1] == pytest.approx([1.0, 0.6])


def test_with_named_recipes_puts_recorded_recipes_in_place_of_their_names(tmp_path: Path) -> None:
    def outcome(score: int, answer: str, **more: Any) -> dict[str, Any]:
        return {"score": score, "answer": answer, **more}

    rows: list[dict[str, Any]] = [
        {
            "category": "x",
            "outcomes": {
                "a": outcome(i % 2, "1"),
                "b": outcome(0, "2"),
                "c": outcome(i % 3 == 0, "1"),
                "council": outcome(1, "1", recipe=True, cost=20.0),
                "panel": outcome(i % 2, "1", recipe=True, cost=9.0),
            },
        }
        for i in range(6)
    ]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": str(i), "prompt": f"p{i}", **row}) for i, row in enumerate(rows)]
    file.write_text("\n".join(lines), encoding="utf-8")
    found, _ = read_outcomes([file], {**COSTS, "council": 1.0, "panel": 1.0})
    tried = [one for one in candidates(found) if one.kind != "single"]
    assert tried
    assert not any({"council", "panel"} & set(one.experts) for one in tried)
    given = estimate(found, settings=SETTINGS)
    settings = Deliberation(2, 16.0, 0.2, 512, "", "")
    council = Recipe("deliberate", ("a", "b", "c"), deliberation=settings)
    panel = Recipe("recruit", ("a", "b", "c"), recruitment=Recruitment(2, "c", ""))
    made = with_named_recipes(given, {"council": council, "panel": panel})
    assert quality(made, "x", council.name) == 1.0
    at = made.recipes.index(council)
    assert made.cost[0, at] == 20.0
    assert made.reach[0, at, :3].tolist() == [1.0, 1.0, 1.0]
    assert made.reach[0, made.recipes.index(panel), :3] == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert council not in only(made, ["a", "b"]).recipes
    assert council in only(made, ["a", "b", "c"]).recipes
