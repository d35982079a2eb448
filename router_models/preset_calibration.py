"""Calibrates what a point of quality is worth in `auto:fast`, `auto` and `auto:best`.

The general κ (`router_models.preset_choice`) is chosen on one half of the prompts of several pools
of experts, and judged on the other half. Each pool's own κ is chosen and judged by folds. A router
that was fitted on other folds decides about each prompt.

    python -m router_models.cli calibrate --data NAME OUTCOMES COSTS EXPERTS
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.fit_settings import Settings
from router_models.frontier_evaluation import Comparison, comparison, standard_error
from router_models.outcome_reader import read_costs, read_outcomes
from router_models.preset_choice import (
    EQUAL_POINTS,
    FOLDS,
    KAPPAS,
    RULES,
    Played,
    Rule,
    choose,
    judge_own,
    least_costs,
    own_to_json,
    play_compared,
    point_cost,
)
from router_models.two_stage_fit import Problem


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


def play_set(data: DataSet, seed: int, say: Callable[[str], None]) -> tuple[Played, Comparison]:
    """Decide about every prompt of a data set at every κ."""
    table, skipped = read_outcomes(
        [data.outcomes], read_costs(data.costs, [data.outcomes]), data.experts
    )
    for line in skipped.lines():
        say(f"{data.name}: {line}")
    problem = Problem(table, Settings(seed=seed))
    predicted, reference = problem.out_of_fold_with_reference(FOLDS)
    compared = comparison(table, problem.played, predicted)
    halves = [
        zlib.crc32(f"half/{seed}/{p}".encode("utf-8", "replace")) % 2
        for p in compared.table.prompts
    ]
    chosen_on = np.array(halves) == 0
    return play_compared(data.name, compared, reference[compared.rows], chosen_on), compared


def run(
    data: Sequence[DataSet], *, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Calibrate the presets on the data sets.

    Returns:
        By preset: `point_cost`, `kappa`, and for each data set `lead` in points and the share of
        `cost` of always asking the best, both on the rows apart, with standard errors; `own`, the
        same by a price that the data set's other folds chose for it alone (`own_to_json`); and
        `least_costs`.

    Raises:
        OutcomeError: A file can't be used.
        ValueError: A data set has no row with every expert.
    """
    played, own, bounds = [], [], []
    for one in data:
        results, compared = play_set(one, seed, say)
        played.append(results)
        own.append(own_to_json(judge_own(results, seed)))
        bounds.append(least_costs(compared))
        say(f"{one.name}: {len(results.prompts)} prompts, always the best is {results.best}")
    found = {name: _preset(played, rule) for name, rule in RULES.items()}
    for name, preset in found.items():
        for i, one in enumerate(data):
            preset["sets"][one.name] |= {"own": own[i][name], "least_costs": bounds[i]}
    return found


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


def _own_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "by prices of its own, chosen on other folds:"]
    for preset, result in found.items():
        for name, one in result["sets"].items():
            own = one["own"]
            (low, high), (least, most) = own["lead_interval"], own["cost_interval"]
            lines.append(
                f"{preset:8}{name[:20]:20}{own['lead']:+10.2f} ({low:+.2f} to {high:+.2f})"
                f"{100 * own['cost']:10.1f} % ({100 * least:.1f} to {100 * most:.1f} %)"
                f"   point_cost {own['point_cost']:g}"
            )
    lines += ["", f"least cost within {EQUAL_POINTS:g} point of always the best, outcomes known:"]
    for name, one in result["sets"].items():
        told = ", ".join(
            f"{how} {'out of reach' if share is None else f'{100 * share:.1f} %'}"
            for how, share in one["least_costs"].items()
        )
        lines.append(f"{name[:20]:20}{told}")
    return [*lines, ""]


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
    lines += _own_lines(found)
    lines += ["router:", "  presets:"]
    lines += [f"    {name}: {{point_cost: {one['point_cost']:g}}}" for name, one in found.items()]
    return lines
