"""A batch's choices under a budget on recorded outcomes, with known and with learned lengths.

The expected quality is a router's that has not seen the rows. Costs are the recorded lengths of
prompts and answers times each expert's price. With known lengths, the plan has these costs. With
learned ones it has the mean length of its category and expert on the other folds, and spends the
recorded ones, by the runner's rule: a line that does not fit into what is left does not run.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtests.lib.child_processes import say
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.route.budget_replay import Instance, online, optimum
from router_models.fit_settings import Settings
from router_models.outcome_reader import OutcomeError, read_costs, read_outcomes
from router_models.two_stage_fit import Problem
from service.broker.batch_knapsack import BatchBounds, BatchOptions, solve

Floats = NDArray[np.float64]

_FOLDS = 5
_ORDERS = 5
_PARTS = (0.1, 0.25, 0.5)
_KNOWN, _LEARNED = 0.999, 0.98
_CHARS = 4.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """What calls cost, (N, E): as recorded, and as the other folds let expect."""

    known: Floats
    learned: Floats


def read_lengths(
    files: Sequence[Path], ids: Sequence[str], experts: Sequence[str], price: Floats
) -> Lengths:
    """Read the lengths of recorded answers.

    Raises:
        OutcomeError: The files have no lengths.
    """
    rows = {}
    for file in files:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                rows[str(row["id"])] = row
    prompt = np.array([len(rows[i]["prompt"]) / _CHARS for i in ids])
    answer = np.array(
        [
            [rows[i]["outcomes"].get(e, {}).get("output_chars", np.nan) for e in experts]
            for i in ids
        ],
        dtype=float,
    )
    answer /= _CHARS
    if np.isnan(answer).all(axis=0).any():
        raise OutcomeError("these outcomes have no `output_chars` for some expert")
    category = np.array([str(rows[i].get("category")) for i in ids])
    answer = np.where(np.isnan(answer), np.nanmean(answer, axis=0), answer)
    fold = np.random.default_rng(0).integers(0, _FOLDS, len(ids))
    expected = np.empty_like(answer)
    for k in range(_FOLDS):
        for name in np.unique(category):
            here = (fold == k) & (category == name)
            seen = (fold != k) & (category == name)
            expected[here] = answer[seen if seen.any() else fold != k].mean(axis=0)
    unit = price / 1000
    return Lengths(unit * (prompt[:, None] + answer), unit * (prompt[:, None] + expected))


def plan(quality: Floats, cost: Floats, budget: float) -> tuple[NDArray[np.intp], float]:
    """The choice of each row, and the upper bound of the total quality."""
    lines, experts = quality.shape
    options = BatchOptions(
        quality,
        cost,
        np.ones(quality.shape, dtype=bool),
        np.zeros((lines, 1)),
        np.ones((experts, 1)),
    )
    found = solve(options, np.zeros((1, 1)), BatchBounds(budget))
    return found.chosen, found.bound


def run(
    quality: Floats, expected: Floats, spends: Floats, chosen: NDArray[np.intp], budget: float
) -> tuple[float, float, int]:
    """Run a plan by the runner's rule: quality, spending, and lines that did not run.

    A line's calls may cost what is left at most: the gateway bounds its answer.
    """
    total = spent = 0.0
    refused = 0
    for line in np.random.default_rng(1).permutation(len(chosen)).tolist():
        r = chosen[line]
        if spent + expected[line, r] > budget:
            refused += 1
            continue
        spent += min(float(spends[line, r]), budget - spent)
        total += float(quality[line, r])
    return total, spent, refused


def _online(given: Instance, budget: float) -> float:
    """The mean quality of choosing line by line with the service's own shadow prices."""
    runs = [online(given, budget, seed, "resolved").quality for seed in range(_ORDERS)]
    return float(np.mean(runs))


def measure(report: Report, files: Sequence[Path], costs: Path, experts: Sequence[str]) -> None:
    """Measure on one file of outcomes. Raises OutcomeError."""
    table, skipped = read_outcomes(files, read_costs(costs, files), experts)
    for line in skipped.lines():
        say(line)
    say(f"fitting on {_FOLDS} folds of {len(table)} prompts")
    problem = Problem(table, Settings())
    predicted = problem.out_of_fold(_FOLDS)
    single = [i for i, r in enumerate(problem.played.recipes) if r.kind == "single"]
    names = [problem.played.recipes[i].members[0] for i in single]
    price = np.array([table.cost[:, table.experts.index(name)].max() for name in names])
    lengths = read_lengths(files, table.ids, names, price)
    quality = np.where(np.isfinite(predicted.quality[:, single]), predicted.quality[:, single], 0)
    played = problem.played.score[:, single]
    most = float(lengths.known[np.arange(len(quality)), quality.argmax(axis=1)].sum())
    shown = Table(
        f"{len(quality)} prompts, {len(names)} experts. Two figures: known, and learned lengths",
        (
            "budget, of the best's cost",
            "known lengths, of the optimum",
            "learned, of the optimum",
            "lines that did not run",
            "spent of the budget",
            "over line by line online",
        ),
    )
    report.tables.append(shown)
    for part in _PARTS:
        budget = part * most
        given = Instance(quality, lengths.known, np.nan_to_num(played), lengths.known)
        best, _ = optimum(given, budget / len(quality))
        chosen, _ = plan(quality, lengths.known, budget)
        rows = np.arange(len(quality))
        known = float(quality[rows, chosen].sum())
        spent_known = float(lengths.known[rows, chosen].sum())
        guessed, _ = plan(quality, lengths.learned, budget)
        learned, spent, refused = run(quality, lengths.learned, lengths.known, guessed, budget)
        each = budget / len(quality)
        aside = Instance(quality, lengths.learned, np.nan_to_num(played), lengths.known)
        over_known = known / _online(given, each) - 1
        over_learned = learned / _online(aside, each) - 1
        shown.rows.append(
            (
                f"{part:g}",
                f"{100 * known / best:.3f} %",
                f"{100 * learned / best:.2f} %",
                str(refused),
                f"{100 * spent_known / budget:.3f}, {100 * spent / budget:.2f} %",
                f"{100 * over_known:+.2f}, {100 * over_learned:+.2f} %",
            )
        )
        report.reach += [
            TargetCheck(
                f"at {part:g}, known lengths, of the optimum, at least",
                _KNOWN,
                round(known / best, 6),
                known / best >= _KNOWN,
            ),
            TargetCheck(
                f"at {part:g}, learned lengths, of the optimum, at least",
                _LEARNED,
                round(learned / best, 5),
                learned / best >= _LEARNED,
            ),
            TargetCheck(
                f"at {part:g}, spent of the budget, at most",
                1.0,
                round(max(spent_known, spent) / budget, 6),
                max(spent_known, spent) <= budget * (1 + 1e-9),
            ),
        ]
        report.facts[f"budget_{part:g}"] = {
            "known": known / best,
            "learned": learned / best,
            "over_online": {"known": over_known, "learned": over_learned},
            "refused": refused,
        }
