"""What recorded outcomes say of each recipe: quality, cost and reach by category. Pure.

Means are shrunk toward the recipe's overall mean (`expert_map_fit`), as strongly as the rows
themselves say: outcomes of which categories decide little would otherwise make the best of many
recipes look better than it is. A category without outcomes has the overall means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from router_models.expert_map_fit import shrunk_cells
from router_models.fit_settings import Settings
from router_models.outcome_reader import OutcomeError, Table
from router_models.recipe_replay import candidates, play
from service.classifier.expert_map import ExpertMap
from service.types import Recipe

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

GENERAL = "general"
# Pseudo-rows of the overall mean, of which the rows choose one.
SHRINKAGES = (15.0, 30.0, 60.0, 125.0, 250.0, 500.0, 1000.0)
_FOLDS = 5
# With fewer rows there is nothing to choose by.
_LEAST_ROWS = 50
# Of recipes with several experts, so many at most are weighed.
MAX_COMBINED = 300


@dataclass(frozen=True, slots=True)
class Estimates:
    """Estimates of R recipes on C categories.

    Attributes:
        categories: The categories.
        recipes: The recipes.
        share: (C,), each category's share of the traffic; the sum is 1.
        quality: (C, R), expected quality in [0, 1].
        cost: (C, R), expected cost of a request.
        reach: (C, R, experts of a recipe), probability that each is asked.
        rows: (C,), the rows of each category; 0 where the overall means stand in.
    """

    categories: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    share: Floats
    quality: Floats
    cost: Floats
    reach: Floats
    rows: Floats


def estimate(
    table: Table, traffic: Mapping[str, float] | None = None, settings: Settings | None = None
) -> Estimates:
    """Estimate every recipe that is worth trying on every category.

    Args:
        table: Recorded outcomes. Rows without a category count for the overall means only.
        traffic: Share of each category, of any sum; default: as in the rows.
        settings: Settings of the fit; default: the rows choose how strongly means are shrunk.

    Raises:
        OutcomeError: The traffic is empty.
    """
    named = {c for c in table.categories if c is not None}
    categories = tuple(sorted({*(traffic or ()), *named})) or (GENERAL,)
    index = {name: c for c, name in enumerate(categories)}
    # Rows without a category have a row of their own below, which is dropped.
    nowhere = len(categories)
    label = np.array([index.get(c, nowhere) if c else nowhere for c in table.categories])
    results = play(candidates(table), table)
    width = max(len(recipe.experts) for recipe in results.recipes)
    cells = len(categories) + 1
    shrink_rows = (
        choose_shrinkage(results.score, label, cells) if settings is None else settings.shrink_rows
    )
    quality, counts = shrunk_cells(results.score, label, cells, shrink_rows)
    cost, _ = shrunk_cells(results.cost, label, cells, shrink_rows)
    judged = np.flatnonzero(counts.sum(axis=0) > 0)
    reach = np.zeros((cells, len(results.recipes), width))
    for r, recipe in enumerate(results.recipes):
        together = len(recipe.members)
        reach[:, r, :together] = 1.0
        if recipe.later:
            asked = results.reach[:, r, : len(recipe.later)].astype(np.float64)
            asked[np.isnan(results.score[:, r])] = np.nan
            later, _ = shrunk_cells(asked, label, cells, shrink_rows)
            reach[:, r, together : len(recipe.experts)] = later
    if traffic:
        share = np.array([max(0.0, float(traffic.get(name, 0.0))) for name in categories])
    else:
        share = np.bincount(label, minlength=cells)[:nowhere].astype(np.float64)
        if not share.sum():
            share = np.ones(len(categories))
    if not share.sum() > 0:
        raise OutcomeError("the traffic is empty: a share above 0 is needed")
    found = Estimates(
        categories,
        results.recipes,
        share / share.sum(),
        np.clip(quality[:nowhere], 0.0, 1.0),
        np.maximum(cost[:nowhere], 0.0),
        np.clip(reach[:nowhere], 0.0, 1.0),
        np.bincount(label, minlength=cells)[:nowhere].astype(np.float64),
    )
    promising = set(_promising(found))
    return take(found, [r for r in judged if r in promising])


def choose_shrinkage(score: Floats, label: Ints, categories: int) -> float:
    """Choose the shrinkage that best predicts the differences between recipes on other rows.

    An error that all recipes of a row share changes no choice, and does not count.

    Args:
        score: (N, R), scores of recipes; NaN where one is missing.
        label: (N,), the category of each row.
        categories: The number of categories.

    Returns:
        One of `SHRINKAGES`.
    """
    usual = Settings().shrink_rows
    if len(score) < _LEAST_ROWS:
        return usual
    fold = np.random.default_rng(0).integers(0, _FOLDS, len(score))
    error = np.zeros(len(SHRINKAGES))
    for k in range(_FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        for i, shrink_rows in enumerate(SHRINKAGES):
            cells, _ = shrunk_cells(score[inside], label[inside], categories, shrink_rows)
            miss = score[outside] - cells[label[outside]]
            known = ~np.isnan(miss)
            shared = np.where(known, miss, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
            error[i] += float(np.nansum((miss - shared[:, None]) ** 2))
    return SHRINKAGES[int(error.argmin())]


def take(given: Estimates, recipes: Sequence[int]) -> Estimates:
    """Return the estimates of these recipes, in this order."""
    at = list(recipes)
    return replace(
        given,
        recipes=tuple(given.recipes[r] for r in at),
        quality=given.quality[:, at],
        cost=given.cost[:, at],
        reach=given.reach[:, at],
    )


def only(given: Estimates, experts: Sequence[str]) -> Estimates:
    """Return the estimates of the recipes that use only these experts."""
    known = set(experts)
    return take(given, [r for r, one in enumerate(given.recipes) if known.issuperset(one.experts)])


def with_named_recipes(given: Estimates, named: Mapping[str, Recipe]) -> Estimates:
    """Return the estimates with recipes in place of the names under which they were recorded.

    A deliberation asks every member. A recruit asks each of its experts as often as if they were
    equally good, and its aggregator always. Recipes that combine such a name with others are left
    out, because no service can run them.

    Args:
        given: Estimates, in which a recorded recipe is a single expert of its name.
        named: The config's recipes by name.
    """
    keep = [
        r
        for r, one in enumerate(given.recipes)
        if one.kind == "single" or not set(one.experts) & named.keys()
    ]
    kept = take(given, keep)
    found = [
        named.get(one.members[0], one) if one.kind == "single" else one for one in kept.recipes
    ]
    width = max((len(one.experts) for one in found), default=0)
    reach = np.zeros((*kept.cost.shape, max(width, kept.reach.shape[2])))
    reach[:, :, : kept.reach.shape[2]] = kept.reach
    for r, (one, before) in enumerate(zip(found, kept.recipes, strict=True)):
        if one is before:
            continue
        reach[:, r, : len(one.experts)] = 1.0
        if one.recruitment is not None:
            reach[:, r, : len(one.members)] = one.recruitment.k / len(one.members)
            if one.recruitment.aggregator in one.members:
                reach[:, r, one.members.index(one.recruitment.aggregator)] = 1.0
        elif one.later:
            # How often the later ones are asked was not recorded.
            reach[:, r, len(one.members) : len(one.experts)] = 1.0
    first = {one: r for r, one in reversed(list(enumerate(found)))}
    # A recipe may also have been replayed; its own outcomes know it better.
    for r, (one, before) in enumerate(zip(found, kept.recipes, strict=True)):
        if one is not before:
            first[one] = r
    once = sorted(first.values())
    return take(replace(kept, recipes=tuple(found), reach=reach), once)


def _promising(given: Estimates) -> list[int]:
    """Return all single experts, and the recipes that most exceed what their own experts give.

    Memory may be too small for anything else than a recipe's own experts. It therefore counts by
    how much it beats the best mixture of them at its cost, in the category that suits it best.
    """
    single = {
        recipe.members[0]: r for r, recipe in enumerate(given.recipes) if recipe.kind == "single"
    }
    gains: list[tuple[float, int]] = []
    for r, recipe in enumerate(given.recipes):
        if recipe.kind == "single":
            continue
        alone = [single[expert] for expert in recipe.experts if expert in single]
        gain = max(
            float(given.quality[c, r] - mixture(given.quality[c, alone], given.cost[c, alone], x))
            for c, x in enumerate(given.cost[:, r])
        )
        if gain > 0:
            gains.append((-gain, r))
    combined = [r for _, r in sorted(gains)[:MAX_COMBINED]]
    return sorted([*single.values(), *combined])


def mixture(quality: Floats, cost: Floats, budget: float) -> float:
    """Return the best expected quality of a random choice among recipes at a mean cost."""
    best = -np.inf
    for i in range(len(cost)):
        if cost[i] <= budget:
            best = max(best, float(quality[i]))
        for j in range(len(cost)):
            if cost[i] < budget < cost[j]:
                part = (budget - cost[i]) / (cost[j] - cost[i])
                best = max(best, float((1 - part) * quality[i] + part * quality[j]))
    return best


def from_map(found: ExpertMap, traffic: Mapping[str, float] | None = None) -> Estimates:
    """Return the estimates that an artifact's map holds.

    Args:
        found: The map.
        traffic: Share of each category, of any sum; default: as in the map's fit. A category that
            the map has not gets the overall means.

    Raises:
        OutcomeError: The traffic is empty.
    """
    categories = tuple(sorted({*(traffic or ()), *found.categories}))
    weights = np.concatenate((np.eye(len(found.categories)), found.prior[None, :]))
    known = {name: c for c, name in enumerate(found.categories)}
    at = [known.get(name, len(known)) for name in categories]
    if traffic:
        share = np.array([max(0.0, float(traffic.get(name, 0.0))) for name in categories])
    else:
        share = found.prior[at]
    if not share.sum() > 0:
        raise OutcomeError("the traffic is empty: a share above 0 is needed")
    width = max(len(recipe.experts) for recipe in found.recipes)
    reach = np.zeros((len(categories), len(found.recipes), width))
    asked = np.tensordot(weights, found.reach, axes=1)[at]
    for r, recipe in enumerate(found.recipes):
        together = len(recipe.members)
        reach[:, r, :together] = 1.0
        reach[:, r, together : len(recipe.experts)] = asked[:, r, : len(recipe.later)]
    rows = np.append(found.count.max(axis=1), 0.0)[at]
    return Estimates(
        categories,
        found.recipes,
        share / share.sum(),
        np.clip((weights @ found.score)[at], 0.0, 1.0),
        np.maximum((weights @ found.cost)[at], 0.0),
        np.clip(reach, 0.0, 1.0),
        rows,
    )


def with_alternatives(
    table: Table, alternatives: Mapping[str, str], costs: Mapping[str, float]
) -> Table:
    """Return the table with alternatives of its experts.

    An alternative without outcomes of its own has its original's, at costs that differ as their
    usual costs do.

    Args:
        table: Recorded outcomes.
        alternatives: Alternative → its original.
        costs: Usual cost of one call of each alternative and original.

    Raises:
        OutcomeError: An original has no outcomes.
    """
    for alternative, original in alternatives.items():
        if alternative in table.experts:
            continue
        if original not in table.experts:
            raise OutcomeError(
                f"no row has an outcome of {original!r}, of which {alternative!r} is an "
                f"alternative; found: {', '.join(table.experts)}"
            )
        e = table.experts.index(original)
        usual = costs.get(original, 0.0)
        scaled = table.cost[:, e : e + 1] * (costs[alternative] / usual if usual else 1.0)
        cost = scaled if usual else np.full((len(table), 1), costs[alternative])
        table = replace(
            table,
            experts=(*table.experts, alternative),
            score=np.concatenate((table.score, table.score[:, e : e + 1]), axis=1),
            answer=np.concatenate((table.answer, table.answer[:, e : e + 1]), axis=1),
            has_answers=np.append(table.has_answers, table.has_answers[e]),
            cost=np.concatenate((table.cost, cost), axis=1),
        )
    return table
