"""Finds the experts to hold in memory, and a recipe for each category.

    max  Σ_c p_c Σ_r W[c,r]·x[c,r]
    s.t. Σ_r x[c,r] = 1,  x[c,r] ≤ y[e] for every expert e that r may ask,
         Σ_e bytes[e]·y[e] ≤ memory,  Σ_c p_c Σ_r cost[c,r]·x[c,r] ≤ budget,
         x, y ∈ {0, 1}

Solved exactly by HiGHS (Huangfu and Hall, 2018) through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from service.types import Recipe

Floats = NDArray[np.float64]

# The status codes of `scipy.optimize.milp`.
_OPTIMAL, _TIME_OUT = 0, 1


@dataclass(frozen=True, slots=True)
class Composition:
    """A choice: experts held, recipe for each category, expected score and cost a call.

    Attributes:
        optimal: Whether it is proven that no choice is better.
        gap: The largest possible improvement of the expected score; 0 where `optimal`.
    """

    experts: tuple[str, ...]
    recipes: dict[str, str]
    score: float
    cost: float
    memory: float
    optimal: bool
    gap: float


def compose(
    *,
    categories: Sequence[str],
    recipes: Sequence[Recipe],
    prior: Floats,
    score: Floats,
    cost: Floats,
    sizes: Mapping[str, float],
    memory: float = np.inf,
    budget: float = np.inf,
    time_limit_s: float = 60.0,
) -> Composition:
    """Find the best composition under bounds on memory and cost.

    If the time is too short to prove the optimum, the result is the best composition found, with
    a bound on its distance from the optimum.

    Args:
        categories: Names of the C categories.
        recipes: The R recipes.
        prior: (C,), share of the traffic by category.
        score: (C, R), expected score of each recipe on each category.
        cost: (C, R), expected cost of a call.
        sizes: Size of each expert, in the unit of `memory`.
        memory: Bound on the sizes of all used experts.
        budget: Bound on the expected cost of a call.
        time_limit_s: Time limit of the solver, in s.

    Raises:
        ValueError: An expert has no size, no choice fits both bounds, or none was found in time.
    """
    experts = tuple(dict.fromkeys(e for recipe in recipes for e in recipe.experts))
    unknown = [e for e in experts if e not in sizes]
    if unknown:
        raise ValueError(f"no size is given for {', '.join(unknown)}")
    cells, count, held = len(categories), len(recipes), len(experts)
    x_count = cells * count
    size = np.array([float(sizes[e]) for e in experts])
    gain = np.concatenate(((prior[:, None] * score).ravel(), np.zeros(held)))
    spent = np.concatenate(((prior[:, None] * cost).ravel(), np.zeros(held)))
    # Among equal optima this term prefers less memory and less cost.
    thrift = 1e-7 * np.concatenate(
        (spent[:x_count] / max(float(spent.max()), 1e-12), size / max(float(size.max()), 1e-12))
    )
    constraints = [
        LinearConstraint(
            sparse.csr_matrix(
                (np.ones(x_count), (np.repeat(np.arange(cells), count), np.arange(x_count))),
                shape=(cells, x_count + held),
            ),
            1,
            1,
        )
    ]
    # One row for each expert and recipe: Σ_c x[c, r] ≤ C·y[e] is weaker than a row a cell,
    # which HiGHS solves faster because its relaxation is tight.
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    row = 0
    for r, recipe in enumerate(recipes):
        for expert in recipe.experts:
            for c in range(cells):
                rows += [row, row]
                columns += [c * count + r, x_count + experts.index(expert)]
                values += [1.0, -1.0]
                row += 1
    constraints.append(
        LinearConstraint(
            sparse.csr_matrix((values, (rows, columns)), shape=(row, x_count + held)), -np.inf, 0
        )
    )
    if np.isfinite(memory):
        constraints.append(
            LinearConstraint(np.concatenate((np.zeros(x_count), size))[None], -np.inf, memory)
        )
    if np.isfinite(budget):
        constraints.append(LinearConstraint(spent[None], -np.inf, budget))
    found = milp(
        thrift - gain,
        integrality=np.ones(x_count + held),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        bounds = f"memory {memory:g} and budget {budget:g}"
        if found.status == _TIME_OUT:
            raise ValueError(
                f"no choice of experts that fits {bounds} was found in {time_limit_s:g} s; "
                "that none exists is not proven"
            )
        raise ValueError(f"no choice of experts fits {bounds}: {found.message}")
    x = found.x[:x_count].reshape(cells, count) > 0.5
    chosen = x.argmax(axis=1)
    at = np.arange(cells)
    used = {e for r in chosen for e in recipes[r].experts}
    kept = tuple(e for e in experts if e in used)
    reached = float(prior @ score[at, chosen])
    # What was minimised has the thrift in it, of which any choice has this much at most.
    most_thrift = thrift[:x_count].reshape(cells, count).max(axis=1).sum() + thrift[x_count:].sum()
    bound = np.inf if found.mip_dual_bound is None else most_thrift - found.mip_dual_bound
    optimal = found.status == _OPTIMAL
    return Composition(
        experts=kept,
        recipes={name: recipes[r].name for name, r in zip(categories, chosen, strict=True)},
        score=reached,
        cost=float(prior @ cost[at, chosen]),
        memory=float(sum(sizes[e] for e in kept)),
        optimal=optimal,
        gap=0.0 if optimal else max(0.0, float(bound) - reached),
    )
