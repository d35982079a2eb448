"""Random composition problems: small ones for a count by hand, and large ones for the time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from router_models.composition.composition_problem import (
    Accelerators,
    Bounds,
    Problem,
    SwapMethod,
    Unit,
)
from service.types import MAX_LATER, Recipe

GIB = 1024**3
# Sizes of public models in GiB, with 16, 8 and 4 bits a weight: 1.5, 3, 7, 8, 14, 32 and 70 B.
_PARAMETERS_B = (1.5, 3.0, 7.6, 8.0, 14.8, 32.8, 70.6)
_BYTES_PER_WEIGHT = (2.0, 1.05, 0.56)


def _reach(categories: int, recipes: tuple[Recipe, ...], rng: np.random.Generator) -> np.ndarray:
    width = max(len(recipe.experts) for recipe in recipes)
    reach = np.zeros((categories, len(recipes), width))
    for r, recipe in enumerate(recipes):
        reach[:, r, : len(recipe.members)] = 1.0
        later = slice(len(recipe.members), len(recipe.experts))
        reach[:, r, later] = rng.uniform(0.1, 0.7, (categories, len(recipe.later)))
    return reach


def small(seed: int) -> Problem:
    """A problem with few enough choices to count them all: every bound is tight in some seed."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 5))
    names = tuple("abcd"[:count])
    recipes = [Recipe("single", (name,)) for name in names]
    recipes.append(Recipe("cascade", tuple(names[:2]), (names[2],)))
    unified = bool(rng.random() < 0.4)
    method = SwapMethod.INPLACE if unified else rng.choice(list(SwapMethod))
    units = [
        Unit(
            name,
            (name,),
            int(rng.integers(2, 9)) * GIB,
            family=str(rng.choice(["one", "two"])),
            swap_s=float(rng.uniform(0.1, 1)),
            load_s=float(rng.uniform(1, 5)),
            start_s=float(rng.uniform(10, 40)),
        )
        for name in names
    ]
    if rng.random() < 0.4:
        # An adapter: the base's unit has a second form that serves both.
        both = replace(
            units[0],
            name="a+",
            experts=("a", "b"),
            size_bytes=units[0].size_bytes + GIB,
            adapter_bytes=GIB,
        )
        units = [both, *units] if rng.random() < 0.5 else [both, units[0], *units[2:]]
    if unified and rng.random() < 0.4:
        units[-1] = replace(units[-1], needs=names[0])  # merged weights, with their base
    kinds = [
        Accelerators(
            "x",
            1 if unified else int(rng.integers(1, 4 if count == 3 else 3)),
            int(rng.integers(8, 16)) * GIB,
            engine_bytes=int(rng.integers(0, 3)) * GIB,
            replica_bytes=GIB if unified else 0,
            unified=unified,
            method=SwapMethod(method),
            most_slots=2,
        )
    ]
    categories = tuple(f"c{i}" for i in range(3))
    cells = (3, len(recipes))
    bounds = Bounds(
        cost=float(rng.uniform(0.3, 2)) if rng.random() < 0.6 else float("inf"),
        wait_s=float(rng.choice([0.5, 3, 30])) if rng.random() < 0.5 else float("inf"),
        host_bytes=int(rng.integers(4, 20)) * GIB if rng.random() < 0.5 else float("inf"),
        rate_per_s=1.0 if rng.random() < 0.3 else 0.0,
    )
    return Problem(
        categories=categories,
        recipes=tuple(recipes),
        share=rng.dirichlet(np.ones(3)),
        quality=rng.random(cells),
        cost=rng.random(cells) * 2,
        reach=_reach(3, tuple(recipes), rng),
        units=tuple(units),
        accelerators=tuple(kinds),
        bounds=bounds,
        required=frozenset({str(rng.choice(names))}) if rng.random() < 0.5 else frozenset(),
        exclusive=(frozenset({"b", "c"}),) if rng.random() < 0.3 else (),
        busy_s={name: float(rng.uniform(0.05, 0.9)) for name in names},
        time_price=float(rng.choice([0.0, 0.01])),
    )


def large(
    seed: int,
    *,
    experts: int = 150,
    categories: int = 25,
    accelerators: int = 16,
    cascades: int = 60,
    wait_s: float = float("inf"),
    distinct: bool = False,
) -> Problem:
    """A problem of a company: experts of several sizes and forms, some of them specialists.

    Args:
        seed: Draws the problem.
        experts: The number of experts.
        categories: The number of categories.
        accelerators: The number of accelerators of 24 GiB.
        cascades: The number of cascades of two experts.
        wait_s: The bound on waiting for swaps.
        distinct: Whether all experts have different sizes, which is the harder packing.
    """
    rng = np.random.default_rng(seed)
    names = tuple(f"e{i:03d}" for i in range(experts))
    parameters = rng.choice(_PARAMETERS_B, experts, p=(0.2, 0.15, 0.2, 0.15, 0.15, 0.1, 0.05))
    width = rng.choice(_BYTES_PER_WEIGHT, experts, p=(0.5, 0.25, 0.25))
    size = parameters * width * 1e9
    if distinct:
        size *= rng.uniform(0.9, 1.1, experts)
    base = 0.35 + 0.09 * np.log(parameters) - 0.02 * (width < 1)
    quality = base + rng.normal(0, 0.06, (categories, experts))
    for e in range(experts):
        quality[rng.integers(categories), e] += rng.uniform(0.05, 0.25)  # what it was trained for
    quality = np.clip(quality, 0.02, 0.98)
    cost = np.tile(parameters, (categories, 1))
    recipes = [Recipe("single", (name,)) for name in names]
    columns, costs = [quality], [cost]
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < min(cascades, experts * (experts - 1) // 4):
        a, b = (int(i) for i in rng.choice(experts, 2, replace=False))
        if parameters[a] < parameters[b]:
            pairs.add((a, b))
    for a, b in sorted(pairs):
        recipes.append(Recipe("cascade", (names[a],), (names[b],)))
        better = np.maximum(quality[:, a], quality[:, b]) + rng.uniform(-0.03, 0.02, categories)
        columns.append(np.clip(better, 0, 1)[:, None])
        costs.append((parameters[a] + 0.4 * parameters[b]) * np.ones((categories, 1)))
    reach = np.zeros((categories, len(recipes), 1 + MAX_LATER))
    reach[:, :, 0] = 1.0
    reach[:, experts:, 1] = 0.4
    return Problem(
        categories=tuple(f"c{i:02d}" for i in range(categories)),
        recipes=tuple(recipes),
        share=rng.dirichlet(np.ones(categories) * 2),
        quality=np.concatenate(columns, axis=1),
        cost=np.concatenate(costs, axis=1),
        reach=reach,
        units=tuple(
            Unit(
                name,
                (name,),
                int(size[e]),
                family=f"{parameters[e]}/{width[e]}",
                swap_s=size[e] / 20e9,
                load_s=size[e] / 2e9,
                start_s=30 + size[e] / 2e9,
            )
            for e, name in enumerate(names)
        ),
        accelerators=(Accelerators("gpu", accelerators, 22 * GIB, engine_bytes=3 * GIB),),
        bounds=Bounds(cost=float(np.median(parameters)) * 1.2, wait_s=wait_s),
        required=frozenset({names[int(np.argmin(np.abs(parameters - 7.6)))]}),
        time_price=0.001,
    )
