"""The second stage: the map, from rows whose first-stage outputs that stage did not see.

Per category and recipe the mean score and cost, shrunk toward the recipe's own mean, and
slopes on the factors; which recipes are worth keeping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_models.fit_settings import Settings
from router_models.recipe_replay import RecipeResults
from service.classifier.expert_map import DirectEstimate

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

_PENALTY_FOLDS = 5
# In rows: factors that hardly vary load nothing.
_LOADING_PENALTY = 1.0
# In costs of the dearest expert.
_TRUST_PRICES = np.geomspace(0.01, 1.0, 8)


@dataclass(frozen=True, slots=True)
class MapFit:
    """The arrays of an `ExpertMap` for the recipes kept, whose indexes are in `kept`."""

    kept: Rows
    prior: Floats
    score: Floats
    count: Floats
    cost: Floats
    reach: Floats
    score_slope: Floats
    cost_slope: Floats
    direct: DirectEstimate
    trust_power: float

    def estimate(
        self, posterior: Floats, factors: Floats, novel: NDArray[np.bool_]
    ) -> tuple[Floats, Floats]:
        """Quality and cost (rows, kept recipes), as `ExpertMap.estimate` computes for one row.

        `novel` (rows,) says which prompts have too much novelty.
        """
        cross = _cross(posterior, factors)
        flat = (cross.shape[1], len(self.kept))
        quality = posterior @ self.score + cross @ self.score_slope.reshape(flat)
        cost = posterior @ self.cost + cross @ self.cost_slope.reshape(flat)
        trust = np.where(novel, 0.0, posterior.max(axis=1) ** self.trust_power)[:, None]
        own_quality = self.direct.score + factors @ self.direct.score_slope
        own_cost = self.direct.cost + factors @ self.direct.cost_slope
        return (
            trust * np.clip(quality, 0, 1) + (1 - trust) * np.clip(own_quality, 0, 1),
            trust * np.maximum(cost, 0) + (1 - trust) * np.maximum(own_cost, 0),
        )


def shrunk_cells(
    values: Floats, category: Rows, categories: int, shrink_rows: float
) -> tuple[Floats, Floats]:
    """Mean per category and column, shrunk toward the column's own mean; and counts.

    NaNs are left out. A column without any value gets 0.
    """
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    overall = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    member = np.eye(categories)[category]
    count = member.T @ known
    cells = (member.T @ filled + shrink_rows * overall) / np.maximum(count + shrink_rows, 1e-9)
    return cells, count


def select_recipes(score: Floats, cost: Floats, limit: int, singles: int = 0) -> Rows:
    """The columns on or nearest to a frontier of some category, at most `limit`.

    A recipe's regret is how much utility, at the price and in the category
    that suit it best, it lacks to the winner there. The first `singles` columns
    are kept whatever their regret: when experts fail, one that works is needed.
    """
    prices = prices_for(cost)
    regret = np.full(score.shape[1], np.inf)
    for price in prices:
        utility = score - price * cost
        regret = np.minimum(regret, (utility.max(axis=1, keepdims=True) - utility).min(axis=0))
    regret[:singles] = np.minimum(regret[:singles], -1)
    order = np.argsort(regret, kind="stable")[:limit]
    return np.sort(order[regret[order] <= MAX_REGRET])


MAX_REGRET = 0.02
"""A recipe is kept where it lacks at most this much utility to the best."""


def prices_for(cost: Floats, count: int = 160) -> Floats:
    """Prices λ from 0 up to where nothing but the cheapest is worth it, in quality per cost."""
    top = float(np.max(cost))
    if top <= 0:
        return np.zeros(1)
    return np.concatenate(([0.0], np.geomspace(1e-3, 100.0, count) / top))


def fit_map(
    played: RecipeResults,
    category: Rows,
    posterior: Floats,
    factors: Floats,
    true_factors: Floats,
    settings: Settings,
    trust_powers: Sequence[float] = (0.0,),
) -> MapFit:
    """The map from rows whose posterior and factors come from a stage that did not see them.

    `true_factors` (rows, F) are what `factors` estimate. Recipes load on these, so that the direct
    estimate is a ridge regression of their scores. `trust_powers` are those to choose from.
    """
    categories = posterior.shape[1]
    score, count = shrunk_cells(played.score, category, categories, settings.shrink_rows)
    cost, _ = shrunk_cells(played.cost, category, categories, settings.shrink_rows)
    judged = np.flatnonzero(count.sum(axis=0) > 0)
    alone = sum(played.recipes[r].kind == "single" for r in judged)  # they come first
    kept = judged[select_recipes(score[:, judged], cost[:, judged], settings.max_recipes, alone)]
    score, count, cost = score[:, kept], count[:, kept], cost[:, kept]
    reach = np.stack(
        [
            shrunk_cells(
                played.reach[:, kept, i].astype(np.float64),
                category,
                categories,
                settings.shrink_rows,
            )[0]
            for i in range(played.reach.shape[2])
        ],
        axis=2,
    )
    penalties = choose_penalties(
        played.score[:, judged[:alone]], category, posterior, factors, settings
    )
    slopes = [
        _slopes(values - posterior @ cells, posterior, factors, penalties)
        for values, cells in ((played.score[:, kept], score), (played.cost[:, kept], cost))
    ]
    direct = DirectEstimate(
        _means(played.score[:, kept]),
        _means(played.cost[:, kept]),
        played.reach[:, kept].mean(axis=0, dtype=np.float64),
        loadings(played.score[:, kept], true_factors),
        loadings(played.cost[:, kept], true_factors),
    )
    trust_power = choose_trust_power(
        played.take(judged[:alone].tolist()),
        category,
        posterior,
        factors,
        true_factors,
        penalties,
        settings,
        trust_powers,
    )
    return MapFit(
        kept=kept,
        prior=posterior.mean(axis=0),
        score=score,
        count=count,
        cost=cost,
        reach=reach,
        score_slope=slopes[0],
        cost_slope=slopes[1],
        direct=direct,
        trust_power=trust_power,
    )


def choose_penalties(
    score: Floats, category: Rows, posterior: Floats, factors: Floats, settings: Settings
) -> tuple[float, float]:
    """The pair of `slope_penalties` that predicts best in five folds of these rows.

    What counts is the error in the *differences* between experts (N, E) on a
    row: an error shared by all of them changes no choice.
    """
    pairs = settings.slope_penalties
    fold = np.random.default_rng(settings.seed).integers(0, _PENALTY_FOLDS, len(score))
    error = np.zeros(len(pairs))
    for k in range(_PENALTY_FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        cells, _ = shrunk_cells(
            score[inside], category[inside], posterior.shape[1], settings.shrink_rows
        )
        rest = score - posterior @ cells
        cross = _cross(posterior[outside], factors[outside])
        for i, pair in enumerate(pairs):
            slopes = _slopes(rest[inside], posterior[inside], factors[inside], pair)
            miss = rest[outside] - cross @ slopes.reshape(cross.shape[1], -1)
            error[i] += float(_difference_error(miss).sum())
    return pairs[int(error.argmin())]


def choose_trust_power(
    alone: RecipeResults,
    category: Rows,
    posterior: Floats,
    factors: Floats,
    true_factors: Floats,
    penalties: tuple[float, float],
    settings: Settings,
    trust_powers: Sequence[float],
) -> float:
    """The greatest of `trust_powers` that is within one standard error of the best.

    On prompts of the same kinds the categories choose about as well as the direct estimate, or
    better; on others they mislead, and no fold of these rows shows it. So the most careful power
    is taken whose mean is at most one standard error of the best one's mean below it (the one
    standard error rule of Breiman et al., Classification and Regression Trees, 1984). What counts
    is what the chosen expert got in five folds less what it cost, at prices from nothing to the
    dearest expert's cost for one right answer.

    Args:
        alone: The results of single experts on N rows.
        category: (N,).
        posterior: (N, C), of stages that did not see the row.
        factors: (N, F), of the same.
        true_factors: (N, F), what `factors` estimate.
        penalties: Those of the slopes.
        settings: What shrinks the cells, and the seed of the folds.
        trust_powers: The powers to choose from, at least one.
    """
    powers = sorted(trust_powers)
    if len(powers) == 1:
        return powers[0]
    score, cost = alone.score, alone.cost
    prices = np.concatenate(([0.0], _TRUST_PRICES / max(float(np.nanmax(cost)), 1e-12)))
    fold = np.random.default_rng(settings.seed).integers(0, _PENALTY_FOLDS, len(score))
    gained = np.zeros((len(powers), len(score)))
    for k in range(_PENALTY_FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(inside) or not len(outside):
            continue
        cells, _ = shrunk_cells(
            score[inside], category[inside], posterior.shape[1], settings.shrink_rows
        )
        rest = score[inside] - posterior[inside] @ cells
        slopes = _slopes(rest, posterior[inside], factors[inside], penalties)
        cross = _cross(posterior[outside], factors[outside])
        mapped = posterior[outside] @ cells + cross @ slopes.reshape(cross.shape[1], -1)
        loading = loadings(score[inside], true_factors[inside])
        direct = _means(score[inside]) + factors[outside] @ loading
        expected_cost = _means(cost[inside])
        recorded = ~np.isnan(score[outside])
        for i, power in enumerate(powers):
            trust = posterior[outside].max(axis=1, keepdims=True) ** power
            quality = trust * np.clip(mapped, 0, 1) + (1 - trust) * np.clip(direct, 0, 1)
            for price in prices:
                utility = np.where(recorded, quality - price * expected_cost, -np.inf)
                choice = (np.arange(len(outside)), utility.argmax(axis=1))
                got = score[outside][choice] - price * cost[outside][choice]
                gained[i, outside] += np.nan_to_num(got) / len(prices)
    mean = gained.mean(axis=1)
    best = int(mean.argmax())
    error = gained[best].std() / np.sqrt(max(len(score), 1))
    return powers[int(np.flatnonzero(mean >= mean[best] - error)[-1])]


def _means(values: Floats) -> Floats:
    """Mean of each column (R,), NaNs left out; 0 for a column without any value."""
    known = ~np.isnan(values)
    return np.asarray(np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))


def _difference_error(miss: Floats) -> Floats:
    """Squared error of each row (N,) in the differences between columns, NaNs left out."""
    known = ~np.isnan(miss)
    shared = np.where(known, miss, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.asarray(np.nansum((miss - shared[:, None]) ** 2, axis=1))


def loadings(values: Floats, factors: Floats) -> Floats:
    """Loadings (F, R) of the columns of `values` on factors; NaNs count as the column's mean."""
    if not factors.shape[1]:
        return np.zeros((0, values.shape[1]))
    centred = np.nan_to_num(values - _means(values))
    x = factors - factors.mean(axis=0)
    penalty = _LOADING_PENALTY * np.eye(x.shape[1])
    return np.asarray(np.linalg.solve(x.T @ x + penalty, x.T @ centred))


def _cross(posterior: Floats, factors: Floats) -> Floats:
    """Return p ⊗ f of each row, (rows, C·F)."""
    return np.asarray((posterior[:, :, None] * factors[:, None, :]).reshape(len(factors), -1))


def _slopes(
    rest: Floats, posterior: Floats, factors: Floats, penalties: tuple[float, float]
) -> Floats:
    """Slopes (C, F, R) of the residual on the factors: one shared, and each category's own.

    One ridge regression over [f, p ⊗ f], the first half penalised by
    `penalties[0]`, the second by `penalties[1]`. NaNs count as no residual.
    """
    categories, count = posterior.shape[1], factors.shape[1]
    if not count:
        return np.zeros((categories, 0, rest.shape[1]))
    known = np.where(np.isnan(rest), 0.0, rest)
    cross = _cross(posterior, factors)
    x = np.concatenate((factors, cross), axis=1)
    x = x - x.mean(axis=0)
    penalty = np.repeat(penalties, (count, cross.shape[1]))
    weight = np.linalg.solve(x.T @ x + np.diag(penalty), x.T @ (known - known.mean(axis=0)))
    own = weight[count:].reshape(categories, count, -1)
    return np.asarray(own + weight[None, :count])
