"""What a composition is worth: its frontier, shadow prices and experts, as text and JSON.

The prices are finite differences of the whole program: it is solved again with a little more of one
bound, so that they are what the next GiB or unit of cost would buy. A difference within the gap of
the two searches is told as such.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from router_models.composition.composition_problem import Problem
from router_models.composition.composition_value import Composition, by_expert
from router_models.composition.highs_solver import CompositionError, solve

_GIB = 1024**3
# Multiples of the memory that there is, at which the frontier is drawn.
_MEMORY = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
_BUDGETS = 6
# So much of a budget is the step of its price.
_STEP = 0.1
# The searches of a report need not be exact.
_GAP = 1e-3
# Gaps below this would be shown as 0.00 points.
_SHOWN = 5e-5

Solve = Callable[[Problem], Composition | None]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a frontier: a bound, and the best quality within it; `gap` is how much is open."""

    bound: float
    quality: float
    cost: float
    gap: float


@dataclass(frozen=True, slots=True)
class ShadowPrice:
    """What more of a bound buys.

    Attributes:
        of: The bound.
        step: How much more, in `unit`.
        unit: The unit of the step.
        gain: By how much the value increases: quality, less the price of waiting.
        open: How much of the gain may be due to unfinished searches.
    """

    of: str
    step: float
    unit: str
    gain: float
    open: float


@dataclass(frozen=True, slots=True)
class Report:
    """A composition and what was found out about it.

    Attributes:
        composition: The composition.
        memory: The frontier of quality against memory, in GiB of all accelerators.
        budget: The frontier of quality against the mean cost of a request.
        prices: Shadow prices.
        worth: For each expert that is bought, how much value is lost without it; infinite where
            nothing fits without it.
        idle: Experts that are bought and answer no category.
        unbought: Experts that are not bought, and are worth nothing within these bounds.
        worthless: Those of them that are worth nothing with any memory and any budget.
    """

    composition: Composition
    memory: tuple[Point, ...]
    budget: tuple[Point, ...]
    prices: tuple[ShadowPrice, ...]
    worth: dict[str, float]
    idle: tuple[str, ...]
    unbought: tuple[str, ...]
    worthless: tuple[str, ...]


def analyse(problem: Problem, found: Composition, *, time_limit_s: float = 60.0) -> Report:
    """Find out what a composition's experts, memory and budget are worth.

    What does not fit into the time is left out.
    """
    until = time.monotonic() + time_limit_s

    def best(changed: Problem) -> Composition | None:
        left_s = until - time.monotonic()
        if left_s <= 0:
            return None
        try:
            return solve(changed, time_limit_s=max(left_s / 3, 1.0), gap=_GAP, explain=False)
        except CompositionError:
            return None

    free = best(_unbounded(problem))
    used = {e for recipe in found.recipes.values() for e in recipe.experts}
    needed = used | problem.required
    bought = [e for e in found.experts if e not in problem.remote]
    unbought = tuple(e for e in problem.experts if e not in needed)
    never = () if free is None else _never(free, unbought)
    prices = tuple(_prices(problem, found, best))
    memory = tuple(_memory_points(problem, found, best))
    budget = tuple(_budget_points(problem, free, best))
    # Last, because it takes a search for each expert.
    worth = {
        expert: _loss(problem, found, expert, best)
        for expert in found.experts
        if expert in used and expert not in problem.required and until > time.monotonic()
    }
    return Report(
        composition=found,
        memory=memory,
        budget=budget,
        prices=prices,
        worth=worth,
        idle=tuple(e for e in bought if e not in needed),
        unbought=unbought,
        worthless=never,
    )


def _never(free: Composition, unbought: Iterable[str]) -> tuple[str, ...]:
    used = {e for recipe in free.recipes.values() for e in recipe.experts}
    return tuple(e for e in unbought if e not in used)


def _unbounded(problem: Problem) -> Problem:
    """The same problem with any memory and any budget."""
    bounds = replace(problem.bounds, cost=math.inf, host_bytes=math.inf)
    needed = sum(unit.size_bytes + max_engine(problem) for unit in problem.units)
    kinds = tuple(
        replace(kind, memory_bytes=max(kind.memory_bytes, needed + kind.replica_bytes))
        for kind in problem.accelerators
    )
    return replace(problem, bounds=bounds, accelerators=kinds)


def max_engine(problem: Problem) -> int:
    """Return the bytes of an engine beside its weights, on the kind that needs most."""
    return max((kind.engine_bytes for kind in problem.accelerators), default=0)


def with_memory(problem: Problem, factor: float = 1.0, more_bytes: int = 0) -> Problem:
    """Return the problem with another memory of each accelerator."""
    kinds = tuple(
        replace(kind, memory_bytes=int(kind.memory_bytes * factor) + more_bytes)
        for kind in problem.accelerators
    )
    return replace(problem, accelerators=kinds)


def total_gib(problem: Problem) -> float:
    """Return the memory of all accelerators in GiB."""
    return sum(kind.count * kind.memory_bytes for kind in problem.accelerators) / _GIB


def _memory_points(problem: Problem, found: Composition, best: Solve) -> Iterable[Point]:
    for factor in _MEMORY:
        changed = with_memory(problem, factor)
        result = found if factor == 1 else best(changed)
        if result is not None:
            yield Point(total_gib(changed), result.quality, result.cost, result.gap)


def _budget_points(problem: Problem, free: Composition | None, best: Solve) -> Iterable[Point]:
    most = max(free.cost if free is not None else 0.0, problem.cost.max(initial=0.0) * 0.1)
    given = problem.bounds.cost
    steps = {most * (i + 1) / _BUDGETS for i in range(_BUDGETS)}
    for cost in sorted(steps | ({given} if math.isfinite(given) else set())):
        result = best(replace(problem, bounds=replace(problem.bounds, cost=cost)))
        if result is not None:
            yield Point(cost, result.quality, result.cost, result.gap)


def _prices(problem: Problem, found: Composition, best: Solve) -> Iterable[ShadowPrice]:
    bounds = problem.bounds
    step = bounds.cost * _STEP
    ways = [("memory of each accelerator", 1.0, "GiB", with_memory(problem, 1.0, _GIB))]
    if any(not kind.unified for kind in problem.accelerators):
        kinds = tuple(
            kind if kind.unified else replace(kind, count=kind.count + (i == 0))
            for i, kind in enumerate(problem.accelerators)
        )
        ways.append(("accelerators", 1.0, "accelerator", replace(problem, accelerators=kinds)))
    if math.isfinite(bounds.host_bytes):
        more = replace(bounds, host_bytes=bounds.host_bytes + _GIB)
        ways.append(("host memory", 1.0, "GiB", replace(problem, bounds=more)))
    if math.isfinite(bounds.cost) and step > 0:
        more = replace(bounds, cost=bounds.cost + step)
        ways.append(("mean cost of a request", step, "cost", replace(problem, bounds=more)))
    if math.isfinite(bounds.wait_s):
        more = replace(bounds, wait_s=bounds.wait_s + 1)
        ways.append(("wait for swaps", 1.0, "s", replace(problem, bounds=more)))
    for of, amount, unit, changed in ways:
        result = best(changed)
        if result is not None:
            gain = max(0.0, result.value - found.value)
            yield ShadowPrice(of, amount, unit, gain, found.gap + result.gap)


def without(problem: Problem, expert: str) -> Problem:
    """Return the problem without an expert and the recipes that ask it."""
    kept = [r for r, recipe in enumerate(problem.recipes) if expert not in recipe.experts]
    return replace(
        problem,
        recipes=tuple(problem.recipes[r] for r in kept),
        quality=problem.quality[:, kept],
        cost=problem.cost[:, kept],
        reach=problem.reach[:, kept],
        units=tuple(u for u in problem.units if set(u.experts) != {expert}),
    )


def _loss(problem: Problem, found: Composition, expert: str, best: Solve) -> float:
    smaller = without(problem, expert)
    result = best(smaller) if smaller.recipes else None
    return math.inf if result is None else max(0.0, found.value - result.value)


def readable(problem: Problem, report: Report, unit: str) -> list[str]:
    """Return the report as lines of text; `unit` is that of costs."""
    found = report.composition
    proof = (
        "exact: no composition is better"
        if found.exact
        else f"not proven: another one may be better by up to {found.gap:.4g}"
    )
    lines = [
        f"quality {100 * found.quality:.2f} %, cost {found.cost:.6g} {unit} a request, "
        f"{found.mean_wait_s:.3g} s a request for swaps at most",
        f"{proof} ({found.seconds:.1f} s)",
        f"memory {found.used_bytes / _GIB:.2f} of {total_gib(problem):.2f} GiB"
        + (f", host memory {found.pinned_bytes / _GIB:.2f} GiB" if found.pinned_bytes else ""),
        "",
        "where it runs",
    ]
    for held in found.holdings:
        slots = "own engines" if not held.slots else f"{held.slots} slot(s) in turns"
        names = [unit.name for unit in held.residents]
        names += [f"{unit.name} ({tier})" for unit, tier in held.guests]
        lines.append(f"  {held.replicas} x {held.kind.name}, {slots}: {', '.join(names)}")
    lines += ["", "category, share, recipe, expected quality"]
    index = {recipe: r for r, recipe in enumerate(problem.recipes)}
    for c, category in enumerate(problem.categories):
        recipe = found.recipes[category]
        quality = problem.quality[c, index[recipe]]
        lines.append(
            f"  {category}: {100 * problem.share[c]:.1f} %, {recipe.name}, {100 * quality:.1f} %"
        )
    lines += _price_lines(problem, report, unit)
    for title, points in (
        (f"memory in GiB, quality, cost in {unit}", report.memory),
        (f"budget in {unit}, quality, cost in {unit}", report.budget),
    ):
        lines += ["", title]
        lines += [
            f"  {p.bound:.6g}: {100 * p.quality:.2f} %, {p.cost:.6g}"
            + (f" (open: {100 * p.gap:.2f})" if p.gap > _SHOWN else "")
            for p in points
        ]
    return lines


def _price_lines(problem: Problem, report: Report, unit: str) -> list[str]:
    lines = ["", "the next step would buy (finite differences of the whole program)"]
    for price in report.prices:
        note = f", {100 * price.open:.2f} of it open" if price.open > _SHOWN else ""
        lines.append(
            f"  {price.of}: {price.step:.4g} {unit if price.unit == 'cost' else price.unit} more: "
            f"+{100 * price.gain:.3f} points{note}"
        )
    lines += ["", "lost without an expert, in points"]
    for expert, loss in sorted(report.worth.items(), key=lambda one: -one[1]):
        lines.append(
            f"  {expert}: " + ("nothing would fit" if math.isinf(loss) else f"{100 * loss:.2f}")
        )
    used = {e for recipe in report.composition.recipes.values() for e in recipe.experts}
    rest = sorted(used - set(report.worth) - problem.required)
    for title, names in (
        ("not weighed in the time given", rest),
        ("held, and best in no category", report.idle),
        ("worth nothing within these bounds", report.unbought),
        ("worth nothing with any memory and budget", report.worthless),
    ):
        if names:
            lines.append(f"{title}: {', '.join(names)}")
    return lines


def to_json(problem: Problem, report: Report, unit: str) -> dict[str, Any]:
    """Return the report as one JSON object, without infinite numbers; `unit` is that of costs."""
    found = report.composition
    held = by_expert(found.holdings)
    return {
        "quality": found.quality,
        "cost": found.cost,
        "cost_unit": unit,
        "mean_wait_s": found.mean_wait_s,
        "value": found.value,
        "exact": found.exact,
        "gap": found.gap,
        "seconds": found.seconds,
        "used_bytes": found.used_bytes,
        "pinned_bytes": found.pinned_bytes,
        "experts": list(found.experts),
        "replicas": {e: sum(h.replicas for h in held.get(e, ())) for e in found.experts},
        "holdings": [
            {
                "kind": one.kind.name,
                "replicas": one.replicas,
                "slots": one.slots,
                "residents": [unit.name for unit in one.residents],
                "guests": {unit.name: str(tier) for unit, tier in one.guests},
                "pinned": [unit.name for unit in one.pinned],
                "device_bytes": one.device_bytes,
            }
            for one in found.holdings
        ],
        "categories": {
            category: {
                "share": float(problem.share[c]),
                "recipe": found.recipes[category].to_json(),
                "wait_s": found.wait_s[category],
            }
            for c, category in enumerate(problem.categories)
        },
        "frontier": {
            "memory_gib": [_point(p) for p in report.memory],
            "budget": [_point(p) for p in report.budget],
        },
        "shadow_prices": {
            "method": "finite differences of the mixed-integer program",
            "prices": [
                {"of": p.of, "step": p.step, "unit": p.unit, "gain": p.gain, "open": p.open}
                for p in report.prices
            ],
        },
        "worth": {e: None if math.isinf(x) else x for e, x in report.worth.items()},
        "idle": list(report.idle),
        "unbought": list(report.unbought),
        "worthless": list(report.worthless),
    }


def _point(point: Point) -> dict[str, float]:
    return {
        "bound": point.bound,
        "quality": point.quality,
        "cost": point.cost,
        "gap": point.gap,
    }
