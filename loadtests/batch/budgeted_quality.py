"""A batch's choices under a budget on recorded outcomes, with known and with learned lengths.

The expected quality is a router's that has not seen the rows. Costs are the recorded lengths of
prompts and answers times each expert's price. With known lengths, the plan has these costs. With
learned ones it has the mean length of its category and expert on the other folds, and spends the
recorded ones, by the runner's rule: a line that does not fit into what is left does not run. It is
planned once, or again while it runs, as the service does it: by the same code and after as many
lines. The lines of all experts run beside one another, in drawn orders.
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
from service.batches.batch_planner import LineEstimates, replanned
from service.batches.batch_replanning import lines_until_next
from service.batches.batch_types import BatchTerms, FinishedLine, LineChoice
from service.batches.lines_left import LinesLeft, by_model
from service.broker.batch_knapsack import BatchBounds, BatchOptions, solve

Floats = NDArray[np.float64]

_FOLDS = 5
_ORDERS = 5
_PARTS = (0.1, 0.25, 0.5)
_KNOWN, _LEARNED = 0.999, 0.98
_CHARS = 4.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """What calls cost, (N, E): as recorded, and as the other folds let expect.

    Attributes:
        known: As recorded.
        learned: As expected.
        category: (N,), category of each row.
        tokens: (N, E), expected tokens.
    """

    known: Floats
    learned: Floats
    category: NDArray[np.intp]
    tokens: Floats


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
    tokens = prompt[:, None] + expected
    numbers = np.unique(category, return_inverse=True)[1].astype(np.intp)
    return Lengths(unit * (prompt[:, None] + answer), unit * tokens, numbers, tokens)


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


def run_replanned(
    quality: Floats,
    expected: Floats,
    spends: Floats,
    category: NDArray[np.intp],
    tokens: Floats,
    budget: float,
    seed: int,
) -> tuple[float, float, int]:
    """Run a batch that is planned again while it runs: quality, spending, and lines that did not.

    Args:
        quality: (N, E), expected quality.
        expected: (N, E), expected cost.
        spends: (N, E), recorded cost.
        category: (N,), category of each line.
        tokens: (N, E), expected tokens.
        budget: The most that all lines may cost.
        seed: That of the order.
    """
    lines, experts = quality.shape
    names = tuple(map(str, range(experts)))
    rng = np.random.default_rng(seed)
    found = LineEstimates(
        np.arange(lines),
        names,
        names,
        BatchOptions(
            quality,
            expected,
            np.ones(quality.shape, dtype=bool),
            np.zeros(quality.shape),
            np.eye(experts),
        ),
        tokens,
        np.zeros((experts, experts)),
        np.arange(experts),
        ("",) * lines,
        category,
    )
    chosen, _ = plan(quality, expected, budget)
    choices = [
        LineChoice(line, names[r], float(quality[line, r]), float(expected[line, r]), 0.0)
        for line, r in enumerate(chosen.tolist())
    ]
    left = LinesLeft(choices[line] for line in rng.permutation(lines).tolist())
    finished: list[FinishedLine] = []
    total = spent = 0.0
    refused, since, until_next = 0, 0, lines_until_next(lines)
    while models := left.models:
        waiting = np.array([len(each) for each in left.snapshot()], dtype=float)
        choice = left.take(models[int(rng.choice(len(models), p=waiting / waiting.sum()))])
        assert choice is not None
        left.ended(choice)
        r = int(choice.model)
        if spent + choice.cost > budget:
            refused += 1
            continue
        cost = min(float(spends[choice.line, r]), budget - spent)
        spent += cost
        total += float(quality[choice.line, r])
        finished.append(FinishedLine(choice.line, choice.model, cost))
        since += 1
        if since >= until_next and (before := left.snapshot()):
            since, until_next = 0, lines_until_next(sum(map(len, before)))
            made = replanned(found, BatchTerms(max_cost=budget - spent), before, finished)
            if made is not None:
                again = [made.choices[i] for i in rng.permutation(len(made.choices)).tolist()]
                left.exchange(by_model(again))
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
        f"{len(quality)} prompts, {len(names)} experts. Known lengths, learned ones planned once, "
        f"and learned ones planned again (the mean of {_ORDERS} orders)",
        (
            "budget, of the best's cost",
            "known lengths, of the optimum",
            "learned, planned once",
            "planned again, of the optimum",
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
        beside = _online(aside, each)
        over_once = learned / beside - 1
        runs = [
            run_replanned(
                quality,
                lengths.learned,
                lengths.known,
                lengths.category,
                lengths.tokens,
                budget,
                seed,
            )
            for seed in range(_ORDERS)
        ]
        shares = [total / best for total, _, _ in runs]
        again = float(np.mean(shares))
        most_again = max(cost for _, cost, _ in runs)
        over_again = again * best / beside - 1
        shown.rows.append(
            (
                f"{part:g}",
                f"{100 * known / best:.3f} %",
                f"{100 * learned / best:.2f} %",
                f"{100 * again:.2f} ({100 * min(shares):.2f} to {100 * max(shares):.2f}) %",
                f"0, {refused}, {np.mean([lost for _, _, lost in runs]):.1f}",
                f"{100 * spent_known / budget:.3f}, {100 * spent / budget:.2f}, "
                f"{100 * np.mean([cost for _, cost, _ in runs]) / budget:.2f} %",
                f"{100 * over_known:+.2f}, {100 * over_once:+.2f}, {100 * over_again:+.2f} %",
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
                round(again, 5),
                again >= _LEARNED,
            ),
            TargetCheck(
                f"at {part:g}, spent of the budget, at most",
                1.0,
                round(max(spent_known, spent, most_again) / budget, 6),
                max(spent_known, spent, most_again) <= budget * (1 + 1e-9),
            ),
        ]
        report.facts[f"budget_{part:g}"] = {
            "known": known / best,
            "learned_once": learned / best,
            "learned": again,
            "over_online": {"known": over_known, "once": over_once, "learned": over_again},
            "refused": refused,
        }
