"""`python -m loadtests.compose`: what the exact composition is worth, and what it takes.

- Small random problems against trying every composition: both must find the same value.
- 150 experts, 25 categories, 16 accelerators: the time to a gap of 1 %, on one core.
- With `--data FOLDER`, recorded outcomes: compositions bought at 25, 50 and 75 % of the memory that
  all experts take, and greedy ones, chosen on some folds and judged on the others.
- With `--service URL` and `--config FILE`, the running demo: predicted score, cost and waits beside
  what the service gave for tasks that the map was not fitted on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what we state

import numpy as np

from loadtests.compose import held_out_compositions, served_vs_predicted
from loadtests.compose.brute_force import best_value
from loadtests.compose.random_problems import large, small
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from router_models.composition.highs_solver import ROUNDING, CompositionError, solve

_FILES = ("mmlu_pro_dev", "llmrouter")
_COSTS = "active_params_b.json"
_BUDGET_PARTS = (0.5,)
# The problem's size and the gap to reach in the time.
MOST_S, MOST_GAP = 60.0, 0.01


def measure_small(report: Report, seeds: int) -> None:
    """Compare the program with trying every composition."""
    distance, disagreed, infeasible = 0.0, 0, 0
    for seed in range(seeds):
        problem = small(seed)
        best = best_value(problem)
        try:
            found = solve(problem, explain=False)
        except CompositionError:
            infeasible += 1
            disagreed += best is not None
            continue
        if best is None or not found.exact:
            disagreed += 1
        else:
            distance = max(distance, abs(best - found.value))
    report.reach.append(
        at_most("distance from the best of all compositions", ROUNDING, _point(distance))
    )
    report.reach.append(
        at_most("problems where one finds what the other does not", 0, _point(disagreed))
    )
    report.facts["small"] = {
        "problems": seeds,
        "infeasible": infeasible,
        "distance": distance,
        "disagreed": disagreed,
    }
    report.notes.append(
        f"{seeds} small problems, {infeasible} of them infeasible: every composition was tried."
    )


def measure_large(report: Report, seeds: int) -> None:
    """Time large problems to a gap of 1 %."""
    table = Table(
        "150 experts, 25 categories, 16 accelerators of 24 GB; stopped at a gap of 1 % or 60 s",
        ("sizes", "seed", "s", "gap, %", "quality, %", "experts bought", "swap wait, s"),
    )
    facts = []
    slowest = widest = 0.0
    variants = {
        "of public models": {},
        "all different": {"distinct": True},
        "of public models, wait of 20 s at most": {"wait_s": 20.0},
    }
    for name, given in variants.items():
        for seed in range(seeds):
            problem = large(seed, **given)  # type: ignore[arg-type]
            began = time.perf_counter()
            found = solve(problem, time_limit_s=MOST_S, gap=MOST_GAP)
            took = time.perf_counter() - began
            gap = found.gap / found.value
            used = {e for recipe in found.recipes.values() for e in recipe.experts}
            table.rows.append(
                (
                    name,
                    str(seed),
                    f"{took:.1f}",
                    f"{100 * gap:.2f}",
                    f"{100 * found.quality:.2f}",
                    str(len(used)),
                    f"{found.mean_wait_s:.2f}",
                )
            )
            facts.append({"sizes": name, "seed": seed, "seconds": took, "gap": gap})
            slowest, widest = max(slowest, took), max(widest, gap)
    report.tables.append(table)
    report.facts["large"] = facts
    report.reach.append(at_most("s to the gap", MOST_S, _point(slowest)))
    report.reach.append(at_most("gap", MOST_GAP, _point(widest)))


def measure_recorded(report: Report, data: Path, folds: int) -> None:
    """Compare bought with greedy compositions on held-out rows."""
    facts = []
    worst = _point(0.0)
    for name in _FILES:
        file = data / f"{name}.jsonl.gz"
        if not file.is_file():
            report.notes.append(f"{file.name} is not in {data.name}: left out")
            continue
        rows, sizes = held_out_compositions.read(file, data / _COSTS)
        for budget, cost in held_out_compositions.costs_of(rows, _BUDGET_PARTS).items():
            found = held_out_compositions.compare(rows, sizes, folds=folds, seed=0, cost=cost)
            table = Table(
                f"{name}, {len(rows)} prompts, {len(sizes)} experts, budget: {budget}; "
                f"{folds} folds, held out",
                ("memory", "way", "score, %", "cost", "predicted, %", "bought gains", "±"),
            )
            for fraction, ways in found.items():
                bought = ways[held_out_compositions.BOUGHT]
                for way, one in ways.items():
                    more, error = held_out_compositions.gain(bought.score, one.score)
                    if more < worst.value:
                        worst = Estimate(more, more - 1.96 * error, more + 1.96 * error)
                    score = float(np.nanmean(one.score))
                    same = way == held_out_compositions.BOUGHT
                    table.rows.append(
                        (
                            f"{100 * fraction:.0f} %",
                            way,
                            f"{100 * score:.2f}",
                            f"{np.nanmean(one.cost):.2f}",
                            f"{100 * one.predicted:.2f}",
                            "" if same else f"{100 * more:+.2f}",
                            "" if same else f"{100 * error:.2f}",
                        )
                    )
                    facts.append(
                        {
                            "data": name,
                            "budget": budget,
                            "memory": fraction,
                            "way": way,
                            "score": score,
                            "predicted": one.predicted,
                            "gain": more,
                            "error": error,
                        }
                    )
            report.tables.append(table)
    report.facts["recorded"] = facts
    if facts:
        report.reach.append(
            at_least("score that bought gains over any greedy one", 0, worst, interval=True)
        )


def _point(value: float) -> Estimate:
    return Estimate(value, value, value)


def main(argv: list[str] | None = None) -> int:
    """Run the measurements that were asked for."""
    words: argparse.ArgumentParser = parser("compose", __doc__)
    words.add_argument("--data", type=Path, help="folder of recorded outcomes")
    words.add_argument("--folds", type=int, default=5, help="folds of the recorded outcomes")
    words.add_argument("--small", type=int, default=300, help="small problems; 0: none")
    words.add_argument("--large", type=int, default=3, help="large problems of each kind; 0: none")
    words.add_argument("--service", metavar="URL", help="a running service")
    words.add_argument("--config", type=Path, help="the config that --service runs from")
    words.add_argument(
        "--tasks", type=Path, default=served_vs_predicted.TASKS, help="tasks for --service"
    )
    words.add_argument("--preset", default="", choices=("", "fast", "best"), help="of auto")
    words.add_argument(
        "--wait-s",
        type=float,
        help="longest mean wait of --service; default: what swaps take by the config, and 0.05 s",
    )
    given = words.parse_args(argv)
    if (given.service is None) != (given.config is None):
        words.error("--service and --config belong together")

    def measure(_: object) -> Report:
        report = Report("compose")
        if given.small:
            measure_small(report, given.small)
        if given.large:
            measure_large(report, given.large)
        if given.data is not None:
            measure_recorded(report, given.data, given.folds)
        if given.service is not None:
            served_vs_predicted.measure_served(
                report, given.service, given.config, given.tasks, given.preset, given.wait_s
            )
        return report

    return tell(measure, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
