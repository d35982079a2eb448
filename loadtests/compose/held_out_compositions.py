"""Compositions bought on some recorded outcomes, judged on others, beside greedy ones.

A greedy composition takes experts in an order until the memory is full, skipping what does not fit.
It then gets the best recipe for each category from the same exact program, so that only the choice
of experts differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_models.composition.composition_problem import Accelerators, Bounds, Problem, Unit
from router_models.composition.composition_value import Composition
from router_models.composition.highs_solver import CompositionError, solve
from router_models.composition.recipe_estimates import Estimates, estimate, only
from router_models.outcome_reader import Table, read_costs, read_outcomes
from router_models.recipe_replay import play

Floats = NDArray[np.float64]

FRACTIONS = (0.25, 0.5, 0.75)
BOUGHT = "bought"
ORDERS = ("by quality", "by quality per byte", "by popularity")
# Mixtures hold more parameters than a token uses: billions in all, by model.
_TOTAL_B = {"Mixtral-8x7B-Instruct-v0.1": 46.7}
_BYTES_PER_B = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of choosing gave at one memory: per held-out row, and what was predicted."""

    score: Floats
    cost: Floats
    predicted: float
    experts: tuple[tuple[str, ...], ...]


def read(file: Path, costs: Path) -> tuple[Table, dict[str, int]]:
    """Read outcomes and the bytes of each expert's weights, with 16 bits a parameter.

    Raises:
        OutcomeError: They can't be used.
    """
    table, _ = read_outcomes([file], (active := read_costs(costs, [file])))
    kept = np.flatnonzero(np.array([c is not None for c in table.categories]))
    sizes = {e: int(_TOTAL_B.get(e, active[e]) * _BYTES_PER_B) for e in table.experts}
    return table.take(kept), sizes


def problem_of(
    estimates: Estimates, sizes: Mapping[str, int], memory_bytes: float, cost: float
) -> Problem:
    """The problem of holding experts in one memory, without turns."""
    return Problem(
        categories=estimates.categories,
        recipes=estimates.recipes,
        share=estimates.share,
        quality=estimates.quality,
        cost=estimates.cost,
        reach=estimates.reach,
        units=tuple(Unit(name, (name,), size) for name, size in sizes.items()),
        accelerators=(Accelerators("memory", 1, int(memory_bytes), most_slots=0),),
        bounds=Bounds(cost=cost),
    )


def order(name: str, estimates: Estimates, sizes: Mapping[str, int]) -> list[str]:
    """Return the experts in a greedy order.

    Popularity is the share of traffic in whose categories an expert is the best one.
    """
    single = {
        recipe.members[0]: r
        for r, recipe in enumerate(estimates.recipes)
        if recipe.kind == "single"
    }
    quality = {e: float(estimates.share @ estimates.quality[:, r]) for e, r in single.items()}
    experts = list(single)
    best = estimates.quality[:, list(single.values())].argmax(axis=1)
    popular = {e: float(estimates.share[best == i].sum()) for i, e in enumerate(experts)}
    keys: dict[str, Callable[[str], tuple[float, ...]]] = {
        "by quality": lambda e: (quality[e],),
        "by quality per byte": lambda e: (quality[e] / sizes[e],),
        "by popularity": lambda e: (popular[e], quality[e]),
    }
    return sorted(experts, key=keys[name], reverse=True)


def greedy(
    name: str, estimates: Estimates, sizes: Mapping[str, int], memory_bytes: float, cost: float
) -> Composition | None:
    """Choose experts greedily, and recipes exactly; None where nothing fits."""
    left, held = memory_bytes, []
    for expert in order(name, estimates, sizes):
        if sizes[expert] <= left:
            held.append(expert)
            left -= sizes[expert]
    if not held:
        return None
    chosen = only(estimates, held)
    try:
        return solve(
            problem_of(chosen, {e: sizes[e] for e in held}, memory_bytes, cost), explain=False
        )
    except CompositionError:
        return None


def compare(
    table: Table, sizes: Mapping[str, int], *, folds: int, seed: int, cost: float
) -> dict[float, dict[str, Outcome]]:
    """Choose on all folds but one, and judge on that one.

    Args:
        table: Recorded outcomes, all with a category.
        sizes: Bytes of each expert.
        folds: The number of folds.
        seed: Draws the folds.
        cost: The bound on the mean cost of a request.

    Returns:
        For each fraction of all experts' memory, the outcome of each way that always found
        something.
    """
    fold = np.random.default_rng(seed).integers(0, folds, len(table))
    every = float(sum(sizes.values()))
    found: dict[float, dict[str, list[tuple[Floats, Floats, float, tuple[str, ...]]]]] = {
        fraction: {name: [] for name in (BOUGHT, *ORDERS)} for fraction in FRACTIONS
    }
    for k in range(folds):
        estimates = estimate(table.take(np.flatnonzero(fold != k)))
        held_out = table.take(np.flatnonzero(fold == k))
        results = play(estimates.recipes, held_out)
        known = {c: i for i, c in enumerate(estimates.categories)}
        label = np.array([known[str(c)] for c in held_out.categories])
        for fraction in FRACTIONS:
            memory = fraction * every
            ways = {BOUGHT: solve(problem_of(estimates, sizes, memory, cost))}
            for name in ORDERS:
                if (one := greedy(name, estimates, sizes, memory, cost)) is not None:
                    ways[name] = one
            for name, one in ways.items():
                column = {r: i for i, r in enumerate(estimates.recipes)}
                at = np.array([column[one.recipes[c]] for c in estimates.categories])[label]
                rows = np.arange(len(held_out))
                found[fraction][name].append(
                    (results.score[rows, at], results.cost[rows, at], one.quality, _used(one))
                )
    return {
        fraction: {
            name: Outcome(
                np.concatenate([one[0] for one in parts]),
                np.concatenate([one[1] for one in parts]),
                float(np.mean([one[2] for one in parts])),
                tuple(one[3] for one in parts),
            )
            for name, parts in ways.items()
            if len(parts) == folds
        }
        for fraction, ways in found.items()
    }


def _used(one: Composition) -> tuple[str, ...]:
    return tuple(sorted({e for recipe in one.recipes.values() for e in recipe.experts}))


def gain(bought: Floats, other: Floats) -> tuple[float, float]:
    """Return by how much the first scores higher on the rows that both have, and its error."""
    both = ~(np.isnan(bought) | np.isnan(other))
    difference = (bought - other)[both]
    return float(difference.mean()), float(difference.std() / np.sqrt(max(1, len(difference))))


def best_single_cost(table: Table) -> float:
    """Return the mean cost of always asking the best single expert."""
    return float(table.cost[:, int(np.nanmean(table.score, axis=0).argmax())].mean())


def costs_of(table: Table, parts: Sequence[float]) -> dict[str, float]:
    """Return the budgets to compare at, by name: none, and parts of the best expert's cost."""
    dear = best_single_cost(table)
    named = {"none": float("inf")}
    return named | {f"{100 * part:.0f} % of the best expert's": part * dear for part in parts}
