"""Checks a composition against its problem, bound by bound, without the program's formulas."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from router_models.composition.composition_problem import Problem, SwapMethod, Tier
from router_models.composition.composition_value import Composition, Holding, shortest_waits
from router_models.composition.mixed_integer_program import clusters

# Solvers keep to bounds within a tolerance.
_TOLERANCE = 1e-5


def violations(problem: Problem, found: Composition) -> list[str]:
    """Return a line for each bound that a composition breaks; none if it is valid."""
    return [*_recipes(problem, found), *_memory(problem, found), *_load(problem, found)]


def _recipes(problem: Problem, found: Composition) -> Iterator[str]:
    waits = shortest_waits(problem, found.holdings)
    index = {recipe: r for r, recipe in enumerate(problem.recipes)}
    bounds = problem.bounds
    cost = quality = 0.0
    used = set(problem.required)
    for c, category in enumerate(problem.categories):
        recipe = found.recipes[category]
        r = index[recipe]
        cost += problem.share[c] * problem.cost[c, r]
        quality += problem.share[c] * problem.quality[c, r]
        wait = 0.0
        for i, expert in enumerate(recipe.experts):
            used.add(expert)
            if expert not in waits:
                yield f"{category}: {expert} is held nowhere"
                return
            wait += problem.reach[c, r, i] * waits[expert]
        if wait > bounds.wait_s * (1 + _TOLERANCE):
            yield f"{category}: waits {wait:g} s of {bounds.wait_s:g} s"
        if abs(wait - found.wait_s[category]) > _TOLERANCE * max(1.0, wait):
            yield f"{category}: waits {wait:g} s, and {found.wait_s[category]:g} s are told"
    if cost > bounds.cost * (1 + _TOLERANCE) + _TOLERANCE * 1e-3:
        yield f"the mean cost is {cost:g} of {bounds.cost:g}"
    if not math.isclose(cost, found.cost, abs_tol=1e-9) or not math.isclose(
        quality, found.quality, abs_tol=1e-9
    ):
        yield f"quality {quality:g} at {cost:g}: {found.quality:g} at {found.cost:g} are told"
    for expert in sorted(problem.required):
        wait = waits.get(expert, math.inf)
        if math.isinf(wait) or wait > bounds.wait_s * (1 + _TOLERANCE):
            yield f"{expert}, which is required, is not held or waits too long"
    for group in problem.exclusive:
        if len(group & used) > 1:
            yield f"alternatives of one expert are used together: {', '.join(sorted(group & used))}"


def _memory(problem: Problem, found: Composition) -> Iterator[str]:
    counts: Counter[str] = Counter()
    host = 0
    for held in found.holdings:
        kind = held.kind
        counts[kind.name] += held.replicas
        if not kind.unified:
            host += held.replicas * held.host_bytes
        if held.device_bytes > kind.memory_bytes:
            yield f"{kind.name}: {held.device_bytes} of {kind.memory_bytes} bytes"
        if len({unit.name for unit in held.units}) != len(held.units):
            yield f"{kind.name}: a unit stands there twice"
        experts = {expert for unit in held.units for expert in unit.experts}
        for unit in held.units:
            if unit.needs is not None and unit.needs not in experts:
                yield f"{kind.name}: {unit.name} is held without {unit.needs}"
        yield from _guests(held)
    for kind in problem.accelerators:
        if counts[kind.name] > kind.count:
            yield f"{kind.name}: {counts[kind.name]} accelerators of {kind.count}"
    if host > problem.bounds.host_bytes:
        yield f"host memory: {host} of {problem.bounds.host_bytes:g} bytes"


def _guests(held: Holding) -> Iterator[str]:
    if held.guests and not held.slots:
        yield f"{held.kind.name}: guests without a slot"
    if held.slots and len(held.residents) > held.slots:
        yield f"{held.kind.name}: {len(held.residents)} at home in {held.slots} slots"
    for unit, tier in held.guests:
        if tier is Tier.RESPAWN or held.kind.method is not SwapMethod.INPLACE:
            continue
        if all(one.family != unit.family for one in held.residents):
            yield f"{held.kind.name}: no engine of {unit.name}'s family is at home"


def _load(problem: Problem, found: Composition) -> Iterator[str]:
    bounds = problem.bounds
    if not bounds.rate_per_s:
        return
    busy: Counter[str] = Counter()
    for c, category in enumerate(problem.categories):
        recipe = found.recipes[category]
        r = problem.recipes.index(recipe)
        for i, expert in enumerate(recipe.experts):
            asked = bounds.rate_per_s * problem.share[c] * problem.reach[c, r, i]
            busy[expert] += asked * problem.busy_s.get(expert, 0.0)
    used = sum(held.replicas for held in found.holdings if held.units)
    if sum(busy.values()) > bounds.utilisation * used + _TOLERANCE:
        yield f"{used} accelerators are busy for {sum(busy.values()):g} s/s"
    for experts, units in clusters(problem):
        copies = sum(
            held.replicas * problem.copies(unit, tier, held.kind)
            for held in found.holdings
            for unit, tier in (*((one, Tier.HOME) for one in held.residents), *held.guests)
            if unit.name in units
        )
        load = sum(busy[expert] for expert in experts)
        if load > bounds.utilisation * copies + _TOLERANCE:
            yield f"{', '.join(sorted(experts))}: busy for {load:g} s/s in {copies} copies"
