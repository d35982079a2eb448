"""Evaluates a router on held-out rows: frontier, mix, oracle, and their standard errors.

At a price λ, the router takes the recipe with the greatest expected quality - λ · expected cost for
every prompt. A sweep over λ gives the frontier. Between two neighbouring prices, a budget is met by
using each price for a part of the traffic, as pacing does online.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.expert_map_fit import prices_for
from router_models.outcome_reader import Table
from router_models.recipe_replay import RecipeResults
from router_models.two_stage_fit import Predicted

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sweep:
    """Results of each of P prices: `choice`, `score` and `cost` (P, N).

    `rows` (N,) are the rows judged: those for which some recipe's outcome is recorded.
    """

    rows: NDArray[np.int64]
    price: Floats
    choice: NDArray[np.int64]
    score: Floats
    cost: Floats

    def split(self, budget: float) -> tuple[int, int, float]:
        """Prices (i, j) and the share of i in a mixture whose mean cost is `budget` or less."""
        mean = self.cost.mean(axis=1)
        within = np.flatnonzero(mean <= budget)
        if not len(within):
            cheapest = int(mean.argmin())
            return cheapest, cheapest, 1.0
        i = int(within[0])  # prices ascend: the first within budget spends most
        if i == 0 or mean[i - 1] <= mean[i]:
            return i, i, 1.0
        j = i - 1
        return i, j, float((mean[j] - budget) / (mean[j] - mean[i]))

    def rows_at(self, budget: float) -> tuple[Floats, Floats]:
        """Each row's expected score and cost under `split(budget)`; (N,), (N,)."""
        i, j, share = self.split(budget)
        return (
            share * self.score[i] + (1 - share) * self.score[j],
            share * self.cost[i] + (1 - share) * self.cost[j],
        )


def sweep(played: RecipeResults, predicted: Predicted) -> Sweep:
    """Choose for every row at every price, among the recipes recorded for that row."""
    recorded = ~np.isnan(played.score)
    quality = np.where(recorded, predicted.quality, -np.inf)
    rows = np.flatnonzero(np.isfinite(quality).any(axis=1))
    quality, expected = quality[rows], predicted.cost[rows]
    price = prices_for(played.cost[recorded])
    choice = np.stack([(quality - p * expected).argmax(axis=1) for p in price])
    return Sweep(rows, price, choice, played.score[rows, choice], played.cost[rows, choice])


# Experts are compared on at least this share of the rows.
_LEAST_COMPARED = 0.5


@dataclass(frozen=True, slots=True)
class Comparison:
    """The rows for which all compared experts have recorded outcomes.

    Attributes:
        rows: The indices of these rows in the whole table, (N,).
        table: The table of these rows.
        played: The results of each recipe on these rows.
        predicted: The router's predictions for these rows.
        left_out: Experts with too few rows, which are left out of the comparison.
    """

    rows: NDArray[np.int64]
    table: Table
    played: RecipeResults
    predicted: Predicted
    left_out: tuple[str, ...]


def comparison(table: Table, played: RecipeResults, predicted: Predicted) -> Comparison:
    """The rows that have every expert, for a comparison of experts, mixtures and the router.

    A mean over other rows would compare prompts instead of experts. The experts with the fewest
    rows are left out until half of the rows have all the others.

    Raises:
        ValueError: No row has an outcome of any expert.
    """
    known = ~np.isnan(table.score)
    total = int(known.any(axis=1).sum())
    if not total:
        raise ValueError("no row has an outcome of any expert")
    counts = known.sum(axis=0)
    compared = [e for e in range(len(table.experts)) if counts[e]]
    while len(compared) > 1 and known[:, compared].all(axis=1).sum() < _LEAST_COMPARED * total:
        compared.remove(min(compared, key=lambda e: (counts[e], -e)))
    rows = np.flatnonzero(known[:, compared].all(axis=1))
    left_out = [e for e in range(len(table.experts)) if e not in compared]
    return Comparison(
        rows,
        table.take(rows),
        played.rows(rows),
        Predicted(predicted.posterior[rows], predicted.quality[rows], predicted.cost[rows]),
        tuple(table.experts[e] for e in left_out),
    )


@dataclass(frozen=True, slots=True)
class Singles:
    """Single experts on N rows: means, and the hull of what mixing them at random gives."""

    names: tuple[str, ...]
    score: Floats
    cost: Floats
    hull: tuple[int, ...]

    def mix(self, cost: float) -> float:
        """Score of the best random mixture of single experts at this mean cost."""
        at = list(self.hull)
        return float(np.interp(cost, self.cost[at], self.score[at]))

    def segment(self, cost: float) -> tuple[int, int, float]:
        """Hull experts (a, b) around `cost` and the share of a."""
        at = list(self.hull)
        if cost <= self.cost[at[0]]:
            return at[0], at[0], 1.0
        for a, b in itertools.pairwise(at):
            if cost <= self.cost[b]:
                return a, b, float((self.cost[b] - cost) / (self.cost[b] - self.cost[a]))
        return at[-1], at[-1], 1.0


def singles(table: Table) -> Singles:
    """Means over all rows, and the upper concave hull of the experts that every row has.

    The others have a score of -inf: over other rows it could not be compared.
    """
    known = ~np.isnan(table.score)
    score = np.where(known.all(axis=0), np.where(known, table.score, 0).mean(axis=0), -np.inf)
    rows = np.maximum(known.sum(axis=0), 1)
    cost = np.where(known, table.cost, 0).sum(axis=0) / rows
    hull: list[int] = []
    for e in sorted(range(len(score)), key=lambda e: (cost[e], -score[e])):
        if not np.isfinite(score[e]) or (hull and score[e] <= score[hull[-1]]):
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (score[b] - score[a]) * (cost[e] - cost[a]) > (score[e] - score[a]) * (
                cost[b] - cost[a]
            ):
                break
            hull.pop()
        hull.append(e)
    return Singles(table.experts, score, cost, tuple(hull))


def oracle(table: Table) -> tuple[float, float]:
    """Score and cost of always asking the cheapest expert that does best on the row."""
    score = np.where(np.isnan(table.score), -1.0, table.score)
    best = score.max(axis=1)
    cost = np.where(score == best[:, None], table.cost, np.inf).min(axis=1)
    return float(best.mean()), float(cost.mean())


def default_budgets(table: Table) -> list[float]:
    """Six budgets from the cheapest expert's cost to the dearest's, evenly in proportion."""
    cost = np.nanmean(table.cost, axis=0)
    low, high = max(float(cost.min()), 1e-12), max(float(cost.max()), 1e-12)
    return [float(f"{b:.3g}") for b in np.geomspace(low, high, 6)]


def report(
    table: Table,
    played: RecipeResults,
    predicted: Predicted,
    labels: Sequence[str],
    budgets: Sequence[float],
) -> dict[str, Any]:
    """The keys of `coe router evaluate --json`; scores in 0..1.

    All results are over the rows of `comparison`, but the accuracy, which is over all that give
    their category.
    """
    compared = comparison(table, played, predicted)
    everything, wanted = table, predicted
    table, played, predicted = compared.table, compared.played, compared.predicted
    found = sweep(played, predicted)
    alone = singles(table)
    best = int(np.argmax(alone.score))
    top = oracle(table)
    finite = np.isfinite(alone.score)
    given = np.array([c is not None for c in everything.categories])
    guess = predicted.posterior.argmax(axis=1)
    accuracy = None
    if given.any():
        guesses = wanted.posterior.argmax(axis=1)
        right = [labels[g] == c for g, c in zip(guesses, everything.categories, strict=True)]
        accuracy = float(np.mean(np.array(right)[given]))
    at = []
    for budget in budgets:
        score, cost = found.rows_at(budget)
        at.append(
            {
                "budget": float(budget),
                "score": float(score.mean()),
                "cost": float(cost.mean()),
                "mix_score": alone.mix(float(cost.mean())),
            }
        )
    return {
        "compared": {"rows": len(table), "of": len(everything), "left_out": [*compared.left_out]},
        "best_single": {
            "model": alone.names[best],
            "score": float(alone.score[best]),
            "cost": float(alone.cost[best]),
        },
        "random": {
            "score": float(alone.score[finite].mean()),
            "cost": float(alone.cost[finite].mean()),
        },
        "oracle": {"score": top[0], "cost": top[1]},
        "mix": [{"cost": float(alone.cost[e]), "score": float(alone.score[e])} for e in alone.hull],
        "frontier": _frontier(found, played, guess[found.rows], labels),
        "at": at,
        "category_accuracy": accuracy,
    }


def _frontier(
    found: Sweep, played: RecipeResults, guess: NDArray[np.int64], labels: Sequence[str]
) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = []
    before: NDArray[np.int64] | None = None
    for p in range(len(found.price) - 1, -1, -1):  # cheapest first
        choice = found.choice[p]
        if before is not None and (choice == before).all():
            continue
        before = choice
        used = {}
        for c, label in enumerate(labels):
            mine = choice[guess == c]
            if len(mine):
                used[label] = played.recipes[int(np.bincount(mine).argmax())].name
        points.append(
            {
                "cost": float(found.cost[p].mean()),
                "score": float(found.score[p].mean()),
                "lambda": float(found.price[p]),
                "recipes": used,
            }
        )
    return points


def with_errors(
    table: Table, played: RecipeResults, predicted: Predicted, budgets: Sequence[float]
) -> list[dict[str, float]]:
    """At each budget: score, cost, mix and gain over it, with standard errors over prompts.

    The gain is compared row by row with the mixture of the two experts around
    that cost, and differences in cost are charged at the mixture's slope. All is over the rows
    of `comparison`.
    """
    compared = comparison(table, played, predicted)
    table, played, predicted = compared.table, compared.played, compared.predicted
    found = sweep(played, predicted)
    alone = singles(table)
    prompts = np.unique(np.array(table.prompts, dtype=object)[found.rows], return_inverse=True)[1]
    rows = []
    for budget in budgets:
        score, cost = found.rows_at(budget)
        mean_cost = float(cost.mean())
        gain = gains(table, found, alone, budget)
        rows.append(
            {
                "budget": float(budget),
                "score": float(score.mean()),
                "score_se": standard_error(score, prompts),
                "cost": mean_cost,
                "mix_score": alone.mix(mean_cost),
                "gain": float(score.mean()) - alone.mix(mean_cost),
                "gain_se": standard_error(gain, prompts),
            }
        )
    return rows


def gains(table: Table, found: Sweep, alone: Singles, budget: float) -> Floats:
    """Each judged row's gain over the mixture of single experts at this budget, (rows,).

    Differences of a row's cost from the mean are charged at the mixture's slope.
    """
    filled = np.where(np.isnan(table.score), alone.score, table.score)
    score, cost = found.rows_at(budget)
    mean_cost = float(cost.mean())
    a, b, share = alone.segment(mean_cost)
    mix = (share * filled[:, a] + (1 - share) * filled[:, b])[found.rows]
    spread = alone.cost[b] - alone.cost[a]
    slope = (alone.score[b] - alone.score[a]) / spread if spread > 0 else 0.0
    return np.asarray(score - mix - slope * (cost - mean_cost))


def compared_lines(compared: dict[str, Any]) -> list[str]:
    """Describe on how many rows experts were compared, if not on all."""
    lines = []
    if compared["rows"] < compared["of"]:
        lines.append(
            f"  compared on the {compared['rows']} of {compared['of']} rows that have every expert"
        )
    if compared["left_out"]:
        lines.append(f"  on too few rows to be compared: {', '.join(compared['left_out'])}")
    return lines


def standard_error(values: Floats, clusters: NDArray[np.intp]) -> float:
    """Return the standard error of the mean of values (N,) that depend on each other in clusters.

    The cluster-robust estimate (Liang and Zeger, 1986) √(Σ_c (Σ_{i in c} (v_i - mean))²) / N; with
    a cluster for each value it is the usual one.

    Args:
        values: (N,).
        clusters: (N,), the cluster of each value as a number from 0 up: here, its prompt.
    """
    sums = np.bincount(clusters, weights=values - values.mean())
    return float(np.sqrt((sums**2).sum()) / len(values))


def plot(report: dict[str, Any], table: Table, path: Path) -> None:
    """Draw the frontier against single experts, their mix and the oracle into `path`."""
    import matplotlib  # for plots only, and slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = ~np.isnan(table.score)
    left_out = report["compared"]["left_out"]
    compared = [e for e, name in enumerate(table.experts) if name not in left_out]
    alone = singles(table.take(np.flatnonzero(known[:, compared].all(axis=1))))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for key, style in (("mix", "k--"), ("frontier", "C0-")):
        points = report[key]
        axes.plot(
            [p["cost"] for p in points],
            [100 * p["score"] for p in points],
            style,
            label={"mix": "random mix of singles", "frontier": "router"}[key],
        )
    for name, cost, score in zip(alone.names, alone.cost, alone.score, strict=True):
        if np.isfinite(score):
            axes.plot(cost, 100 * score, "ko", markersize=4)
            axes.annotate(
                name, (cost, 100 * score), textcoords="offset points", xytext=(4, -9), fontsize=7
            )
    top = report["oracle"]
    axes.plot(top["cost"], 100 * top["score"], "C2*", markersize=11, label="oracle over singles")
    axes.set(xlabel="cost a prompt, all calls counted", ylabel="score, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
