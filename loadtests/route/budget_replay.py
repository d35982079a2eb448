"""Online choices under a budget, replayed over recorded outcomes, against the exact optimum.

The instance is the expectation of a router that has not seen the rows. Both the online choice with
its shadow price and the optimum of the whole batch (HiGHS) know only this expectation. The report
also has the recorded scores and costs of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from loadtests.lib.child_processes import say
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from router_models.fit_settings import Settings
from router_models.outcome_reader import read_costs, read_outcomes
from router_models.recipe_replay import RecipeResults
from router_models.two_stage_fit import Predicted, Problem
from service.broker.budget_pacing import BudgetPacer, BudgetSnapshot, upper_concave_hull

Floats = NDArray[np.float64]

_FOLDS = 5
_ORDERS = 5
_LEAST_SHARE, _LEAST_SPENT = 0.97, 0.98
# The design's rule: the price moves with how far spending is from its share.
_ETA, _SCALE = 0.05, 0.01


@dataclass(frozen=True, slots=True)
class Instance:
    """N prompts, R recipes; arrays (N, R). What is expected, and what was recorded."""

    quality: Floats
    cost: Floats
    scored: Floats
    spent: Floats


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay: expected quality, actual score, and the spent share of the budget."""

    quality: float
    score: float
    spent: float
    unanswered: int


def instance(played: RecipeResults, predicted: Predicted) -> Instance:
    """Rows and recipes for which everything is recorded."""
    rows = ~np.isnan(played.score).any(axis=1)
    kept = np.isfinite(predicted.quality[rows]).any(axis=0)
    quality = predicted.quality[rows][:, kept]
    return Instance(
        quality,
        predicted.cost[rows][:, kept],
        played.score[rows][:, kept],
        played.cost[rows][:, kept],
    )


def optimum(given: Instance, budget: float) -> tuple[float, NDArray[np.intp]]:
    """The most that any assignment can score at this mean expected cost, and one that does.

    HiGHS solves the linear relaxation of this multiple-choice knapsack exactly: an upper bound
    of the whole-numbered optimum. At most one prompt is split in its solution (there is one
    budget); that one is given its cheaper part, so the assignment is within one prompt's worth of
    the bound. Raises ValueError where nothing fits.
    """
    rows, columns = [], []
    for row in range(len(given.quality)):
        # What no price would choose is in no solution of the relaxation.
        for column in upper_concave_hull(given.quality[row], given.cost[row]).tolist():
            rows.append(row)
            columns.append(column)
    at, of = np.array(rows), np.array(columns)
    count, total = len(at), len(given.quality)
    pick = sparse.csr_matrix((np.ones(count), (at, np.arange(count))), shape=(total, count))
    found = optimize.linprog(
        -given.quality[at, of],
        A_ub=sparse.csr_matrix(given.cost[at, of][None, :]),
        b_ub=[budget * total],
        A_eq=pick,
        b_eq=np.ones(total),
        bounds=(0, 1),
        method="highs",
    )
    if found.x is None:
        raise ValueError(f"nothing costs {budget:g} or less: {found.message}")
    chosen = np.full(total, -1, dtype=np.intp)
    for i in np.flatnonzero(found.x > 1e-6).tolist():
        row, column = at[i], of[i]
        if chosen[row] < 0 or given.cost[row, column] < given.cost[row, chosen[row]]:
            chosen[row] = column
    return -float(found.fun), chosen


def online(given: Instance, budget: float, seed: int, rule: str) -> ReplayResult:
    """Answer the prompts in random order; a recipe is taken only if what it costs is left.

    `rule`: `resolved` is the service's own pacing; `stepped` the rule of the design.
    """
    total = len(given.quality)
    amount = budget * total
    spent = quality = score = price = 0.0
    unanswered = 0
    pacer = BudgetPacer()
    for number, row in enumerate(np.random.default_rng(seed).permutation(total).tolist()):
        cost = given.cost[row]
        # The ledger reserves the most that a recipe may cost.
        fits = np.maximum(cost, given.spent[row]) <= amount - spent
        worth = np.where(fits, given.quality[row], -np.inf)
        if not np.isfinite(worth).any():
            unanswered += 1
            continue
        chosen = int((worth - price * cost).argmax())
        spent += float(given.spent[row, chosen])
        quality += float(given.quality[row, chosen])
        score += float(given.scored[row, chosen])
        if rule == "stepped":
            share = amount * (number + 1) / total
            price = max(0.0, price + _ETA * _SCALE * (spent - share) / share)
            continue
        pacer.observe(given.quality[row], cost)
        if pacer.due():
            price = pacer.reprice(BudgetSnapshot(amount, spent, 0.0, float(total)), number + 1.0)
    return ReplayResult(quality, score, spent / amount, unanswered)


def measure(
    report: Report,
    outcomes: Sequence[Path],
    costs: Path,
    experts: Sequence[str] | None,
    budgets: Sequence[float],
) -> None:
    """Replay at every budget. Raises OutcomeError, ValueError."""
    table, skipped = read_outcomes(outcomes, read_costs(costs, outcomes), experts)
    for line in skipped.lines():
        say(line)
    say(f"fitting on {_FOLDS} folds of {len(table)} prompts")
    problem = Problem(table, Settings())
    given = instance(problem.played, problem.out_of_fold(_FOLDS))
    report_table = Table(
        f"Replay of {len(given.quality)} prompts, {given.quality.shape[1]} recipes, "
        f"{_ORDERS} random orders: the worst of them",
        ("budget", "rule", "of the optimum", "real score of the optimum's", "spent", "unanswered"),
    )
    report.tables.append(report_table)
    rows = np.arange(len(given.quality))
    for budget in budgets:
        say(f"budget {budget:g}: the exact optimum")
        most, best = optimum(given, budget)
        real = float(given.scored[rows, best].sum())
        for rule in ("resolved", "stepped"):
            runs = [online(given, budget, seed, rule) for seed in range(_ORDERS)]
            share = min(run.quality for run in runs) / most
            low, high = min(run.spent for run in runs), max(run.spent for run in runs)
            report_table.rows.append(
                (
                    f"{budget:g}",
                    rule,
                    f"{100 * share:.2f} %",
                    f"{100 * min(run.score for run in runs) / real:.2f} %",
                    f"{100 * low:.2f}–{100 * high:.2f} %",
                    str(max(run.unanswered for run in runs)),
                )
            )
            report.facts[f"replay_{budget:g}_{rule}"] = {
                "share_of_optimum": share,
                "spent_low": low,
                "spent_high": high,
            }
            if rule == "resolved":
                report.reach += [
                    TargetCheck(
                        f"score at {budget:g} against the exact optimum, at least",
                        _LEAST_SHARE,
                        round(share, 4),
                        share >= _LEAST_SHARE,
                    ),
                    TargetCheck(
                        f"spent of {budget:g}, at least",
                        _LEAST_SPENT,
                        round(low, 4),
                        low >= _LEAST_SPENT,
                    ),
                    TargetCheck(f"spent of {budget:g}, at most", 1.0, round(high, 6), high <= 1.0),
                ]
