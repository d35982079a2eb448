"""Calibrates what a point of quality is worth in `auto:fast`, `auto` and `auto:best`.

A preset gives up κ of quality to save the whole cost of an answer by the best. So its price of cost
is λ = κ / reference cost, whatever the unit and the level of prices
(`service.broker.reference_cost`).
κ is chosen on one half of the prompts of several pools of experts, and judged on the other half.
A router that was fitted on other folds decides about each prompt.

    python -m router_models.cli calibrate --data NAME OUTCOMES COSTS EXPERTS
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.fit_settings import Settings
from router_models.frontier_evaluation import comparison, standard_error
from router_models.outcome_reader import read_costs, read_outcomes
from router_models.two_stage_fit import Predicted, Problem
from service.broker.reference_cost import best_shares

Floats = NDArray[np.float64]

FOLDS = 5
# Candidates for κ: 0, and twelve a decade.
MAX_POINT_COST = 1000.0
KAPPAS = np.concatenate(([0.0], np.geomspace(0.001, 1.0, 37)))


@dataclass(frozen=True, slots=True)
class Rule:
    """The κ of a preset is the greatest that loses at most so many points on every data set.

    Attributes:
        points: Points that may be lost.
        of_peak: Whether they are lost against the best that the router can do, else against always
            asking the best single expert.
    """

    points: float
    of_peak: bool = False


RULES = {"fast": Rule(5.0), "auto": Rule(1.0), "best": Rule(0.25, of_peak=True)}


@dataclass(frozen=True, slots=True)
class DataSet:
    """Recorded outcomes of one pool of experts.

    Attributes:
        name: For the report.
        outcomes: File of outcomes.
        costs: File of costs.
        experts: The pool; None takes all experts of the file.
    """

    name: str
    outcomes: Path
    costs: Path
    experts: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Played:
    """Results at each of K values of κ on N prompts that have every expert.

    Attributes:
        name: The data set.
        best: The expert with the best mean score.
        chosen_on: (N,), whether κ may be chosen by the prompt.
        prompts: (N,), the number of each row's prompt, for standard errors.
        score: (K, N) in [0, 1].
        cost: (K, N).
        best_score: (N,), the score of the best single expert.
        best_cost: (N,), its cost.
    """

    name: str
    best: str
    chosen_on: NDArray[np.bool_]
    prompts: NDArray[np.intp]
    score: Floats
    cost: Floats
    best_score: Floats
    best_cost: Floats

    def lead(self, rows: NDArray[np.bool_]) -> Floats:
        """(K,), mean score less that of the best single expert, in points."""
        lead = self.score[:, rows].mean(axis=1) - self.best_score[rows].mean()
        return np.asarray(100 * lead)

    def share(self, rows: NDArray[np.bool_]) -> Floats:
        """(K,), mean cost as a share of that of the best single expert."""
        return np.asarray(self.cost[:, rows].mean(axis=1) / self.best_cost[rows].mean())


def play_set(data: DataSet, seed: int, say: Callable[[str], None]) -> Played:
    """Decide about every prompt of a data set at every κ."""
    table, skipped = read_outcomes(
        [data.outcomes], read_costs(data.costs, [data.outcomes]), data.experts
    )
    for line in skipped.lines():
        say(f"{data.name}: {line}")
    problem = Problem(table, Settings(seed=seed))
    predicted, reference = _out_of_fold(problem)
    compared = comparison(table, problem.played, predicted)
    quality, expected = compared.predicted.quality, compared.predicted.cost
    quality = np.where(np.isnan(compared.played.score), -np.inf, quality)
    each = reference[compared.rows]
    rows = np.arange(len(compared.rows))
    level = np.where(each > 0, each, np.inf)[:, None]
    choices = [(quality - kappa / level * expected).argmax(axis=1) for kappa in KAPPAS]
    score = compared.table.score
    known = ~np.isnan(score).any(axis=0)
    best = int(np.where(known, np.where(known, score, 0).mean(axis=0), -np.inf).argmax())
    numbers = np.unique(np.array(compared.table.prompts, dtype=object), return_inverse=True)[1]
    halves = [
        zlib.crc32(f"half/{seed}/{p}".encode("utf-8", "replace")) % 2
        for p in compared.table.prompts
    ]
    return Played(
        name=data.name,
        best=compared.table.experts[best],
        chosen_on=np.array(halves) == 0,
        prompts=numbers,
        score=np.stack([compared.played.score[rows, choice] for choice in choices]),
        cost=np.stack([compared.played.cost[rows, choice] for choice in choices]),
        best_score=score[:, best],
        best_cost=compared.table.cost[:, best],
    )


def choose(played: Sequence[Played], rule: Rule) -> int:
    """The position of a rule's κ, on the rows to choose on; 0, which is κ = 0, if none passes."""
    passes = np.ones(len(KAPPAS), dtype=bool)
    for one in played:
        lead = one.lead(one.chosen_on)
        passes &= lead >= (lead.max() if rule.of_peak else 0.0) - rule.points
    return int(np.flatnonzero(passes)[-1]) if passes.any() else 0


def point_cost(kappa: float) -> float:
    """What one point may cost, as a share of the best's answer: 0.01 / κ to two digits.

    It is rounded up, so that no more quality is given up than was chosen.
    """
    if kappa <= 0:
        return MAX_POINT_COST
    share = 0.01 / kappa
    digit = 10.0 ** (math.floor(math.log10(share)) - 1)
    return min(MAX_POINT_COST, float(f"{math.ceil(share / digit - 1e-9) * digit:.6g}"))


def run(
    data: Sequence[DataSet], *, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Calibrate the presets on the data sets.

    Returns:
        By preset: `point_cost`, `kappa`, and for each data set `lead` in points and the share of
        `cost` of always asking the best, both on the rows apart, with standard errors.

    Raises:
        OutcomeError: A file can't be used.
        ValueError: A data set has no row with every expert.
    """
    played = []
    for one in data:
        played.append(play_set(one, seed, say))
        say(f"{one.name}: {len(played[-1].prompts)} prompts, always the best is {played[-1].best}")
    return {name: _preset(played, rule) for name, rule in RULES.items()}


def _preset(played: Sequence[Played], rule: Rule) -> dict[str, Any]:
    at = choose(played, rule)
    sets = {}
    for one in played:
        apart = ~one.chosen_on
        gain = 100 * (one.score[at] - one.best_score)[apart]
        sets[one.name] = {
            "best": one.best,
            "rows": int(apart.sum()),
            "lead": float(one.lead(apart)[at]),
            "lead_se": standard_error(gain, _numbered(one.prompts[apart])),
            "cost": float(one.share(apart)[at]),
        }
    return {
        "point_cost": point_cost(float(KAPPAS[at])),
        "kappa": float(KAPPAS[at]),
        "mean_cost": float(np.mean([one.share(~one.chosen_on)[at] for one in played])),
        "sets": sets,
    }


def _numbered(prompts: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.unique(prompts, return_inverse=True)[1]


def readable(found: dict[str, Any]) -> list[str]:
    """The result as lines: a table, and the section of the config."""
    lines = ["preset  data set            points lost or won    cost of always the best"]
    for preset, result in found.items():
        for name, one in result["sets"].items():
            lines.append(
                f"{preset:8}{name[:20]:20}{one['lead']:+10.2f} ± {1.96 * one['lead_se']:.2f}"
                f"{100 * one['cost']:20.1f} %"
            )
        lines.append(f"{preset:8}{'mean':20}{'':17}{100 * result['mean_cost']:20.1f} %")
    lines += ["router:", "  presets:"]
    lines += [f"    {name}: {{point_cost: {one['point_cost']:g}}}" for name, one in found.items()]
    return lines


def _out_of_fold(problem: Problem) -> tuple[Predicted, Floats]:
    """Predictions for every row by a fit without it, and the reference cost of each row, (N,)."""
    fold = problem.fold_of(FOLDS, "outer")
    shape = (len(problem.table), len(problem.played.recipes))
    posterior = np.zeros((shape[0], len(problem.labels)))
    quality, cost = np.full(shape, -np.inf), np.zeros(shape)
    reference = np.zeros(shape[0])
    for k in range(FOLDS):
        train, test = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(train) or not len(test):
            continue
        fitted = problem.fit(train)
        part = problem.predict(fitted, test)
        posterior[test], quality[test], cost[test] = part.posterior, part.quality, part.cost
        shares = best_shares(fitted.map.score, fitted.map.cost.mean(axis=0))
        reference[test] = cost[np.ix_(test, fitted.map.kept)] @ shares
    return Predicted(posterior, quality, cost), reference
