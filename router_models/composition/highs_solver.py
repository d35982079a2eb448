"""Solves composition problems with HiGHS (Huangfu and Hall, 2018) through `scipy.optimize.milp`.

Engines of their own units have to be packed into accelerators. Where their sizes allow few enough
patterns the program holds all of them and is exact. Otherwise it bounds only sums and counts, which
gives a bound on every composition; where its solution can't be packed, sizes are rounded up until
there are few enough patterns. The gap between the two is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds as ColumnBounds
from scipy.optimize import LinearConstraint, milp

from router_models.composition.bound_verification import violations
from router_models.composition.composition_problem import Accelerators, Bounds, Floats, Problem
from router_models.composition.composition_value import (
    Composition,
    evaluate,
    pruned,
    read_holdings,
    shortest_waits,
)
from router_models.composition.engine_packings import maximal_patterns
from router_models.composition.mixed_integer_program import (
    THRIFT,
    Packing,
    Program,
    engine_sizes,
    formulate,
)

# The status codes of `scipy.optimize.milp`.
_OPTIMAL, _TIME_OUT, _INFEASIBLE = 0, 1, 2
# A gap below this is rounding, and the term that prefers less memory and cost.
ROUNDING = 1e-5
# The numbers of sizes to which sizes are rounded up, until there are few enough patterns.
_SIZES = (40, 24, 16, 12, 8, 5, 3, 2, 1)
_MANY_SIZES = 8
# The factors by which sizes are increased instead.
_SLACK = (1.03, 1.08, 1.15)
_RELAXED_PARTS = 5
_GIB = 1024**3


class CompositionError(ValueError):
    """No composition fits the bounds, or none was found in time. The message names the bound."""


@dataclass(frozen=True, slots=True)
class _Run:
    values: Floats | None
    bound: float
    optimal: bool
    timed_out: bool


def solve(
    problem: Problem, *, time_limit_s: float = 60.0, gap: float = 0.0, explain: bool = True
) -> Composition:
    """Find the best composition.

    Args:
        problem: The problem.
        time_limit_s: The longest search, in s.
        gap: The search ends when its result is proven to be within this part of the best.
        explain: Whether to find out which bound is to blame where nothing fits.

    Raises:
        CompositionError: Nothing fits the bounds, or nothing was found in time.
    """
    began = time.monotonic()

    def left_s() -> float:
        return max(0.5, time_limit_s - (time.monotonic() - began))

    packings = {kind.name: _packing(problem, kind) for kind in problem.accelerators}
    program = formulate(problem, packings)
    # A relaxed packing adds to the gap, so that the search itself may add less.
    relaxed = any(p.patterns is None for k, p in packings.items() if _is_packed(problem, k))
    part = gap / _RELAXED_PARTS if relaxed else gap
    run = _run(program, left_s() / (2 if relaxed else 1), part)
    if run.values is None:
        if run.timed_out:
            raise CompositionError(
                f"no composition was found in {time_limit_s:g} s; that none exists is not proven"
            )
        raise CompositionError(
            _why_nothing_fits(problem, left_s) if explain else "no composition fits its bounds"
        )
    bound = run.bound
    holdings = read_holdings(problem, program, run.values, packings)
    for packings in _tighter(problem) if holdings is None else ():
        program = formulate(problem, packings)
        run = _run(program, left_s() / 2, part)
        if run.values is not None:
            holdings = read_holdings(problem, program, run.values, packings)
        if holdings is not None:
            break
    if run.values is None or holdings is None:
        raise CompositionError(
            f"no composition whose engines fit the accelerators was found in {time_limit_s:g} "
            "s; that none exists is not proven"
        )
    values = run.values
    chosen = [int(values[row].argmax()) for row in program.choices]
    chosen = _best_without_traffic(problem, chosen, shortest_waits(problem, holdings))
    needed = {e for r in chosen for e in problem.recipes[r].experts} | problem.required
    holdings = pruned(problem, holdings, needed)
    waits = shortest_waits(problem, holdings)
    quality, cost, each = evaluate(problem, chosen, waits)
    mean = float(problem.share @ each)
    value = quality - problem.time_price * mean
    distance = max(0.0, bound - value)
    exact = run.optimal and gap == 0 and distance <= ROUNDING
    found = Composition(
        recipes={
            name: problem.recipes[r] for name, r in zip(problem.categories, chosen, strict=True)
        },
        experts=tuple(e for e in dict.fromkeys((*problem.experts, *waits)) if e in waits),
        holdings=tuple(holdings),
        quality=quality,
        cost=cost,
        wait_s=dict(zip(problem.categories, map(float, each), strict=True)),
        mean_wait_s=mean,
        value=value,
        gap=0.0 if exact else distance,
        exact=exact,
        seconds=time.monotonic() - began,
    )
    if broken := violations(problem, found):
        raise CompositionError(f"the solver's answer breaks its bounds: {'; '.join(broken)}")
    return found


def _run(program: Program, time_limit_s: float, gap: float) -> _Run:
    matrix, low, high = program.matrix()
    found = milp(
        np.array(program.objective),
        integrality=np.array(program.integer),
        bounds=ColumnBounds(np.array(program.lower), np.array(program.upper)),
        constraints=LinearConstraint(matrix, low, high),
        options={"time_limit": time_limit_s, "mip_rel_gap": gap},
    )
    timed_out = found.status == _TIME_OUT
    if found.x is None and not timed_out and found.status != _INFEASIBLE:
        raise CompositionError(f"the solver failed: {found.message}")
    dual = found.mip_dual_bound
    # What was minimised has the thrift in it, which is at most twice `THRIFT` and not negative.
    bound = math.inf if dual is None else -float(dual) + 2 * THRIFT
    return _Run(found.x, bound, found.status == _OPTIMAL, timed_out)


def _best_without_traffic(
    problem: Problem, chosen: Sequence[int], waits: Mapping[str, float]
) -> list[int]:
    """Choose the best recipe for categories without traffic, which count nothing in the program.

    Their experts are those that are held, of alternatives those that are used already.
    """
    found = list(chosen)
    absent = [c for c, share in enumerate(problem.share) if share <= 0]
    used = {e for c, r in enumerate(chosen) if c not in absent for e in problem.recipes[r].experts}
    used |= problem.required
    barred = {e for group in problem.exclusive if group & used for e in group - used}
    for c in absent:
        best = -math.inf
        for r, recipe in enumerate(problem.recipes):
            if any(e not in waits or e in barred for e in recipe.experts):
                continue
            asked = zip(recipe.experts, problem.reach[c, r], strict=False)
            wait = float(sum(reach * waits[e] for e, reach in asked))
            if sum(len(group & {*recipe.experts}) > 1 for group in problem.exclusive):
                continue
            value = problem.quality[c, r] - problem.time_price * wait
            if wait <= problem.bounds.wait_s and value > best:
                best, found[c] = value, r
        barred |= {
            e
            for group in problem.exclusive
            if group & {*problem.recipes[found[c]].experts}
            for e in group - {*problem.recipes[found[c]].experts}
        }
    return found


def _is_packed(problem: Problem, name: str) -> bool:
    """Return whether engines of their own units have to be packed into several accelerators."""
    return any(kind.name == name and kind.count > 1 for kind in problem.accelerators)


def _packing(problem: Problem, kind: Accelerators) -> Packing:
    """Return the exact packing, or the relaxed one where it would have too many patterns."""
    sizes = engine_sizes(problem, kind)
    if kind.count == 1:
        return Packing(sizes, None)  # the sum of the sizes is all there is
    return Packing(sizes, maximal_patterns(list(sizes.values()), kind.room_bytes))


def _tighter(problem: Problem) -> Iterator[dict[str, Packing]]:
    """Yield packings that leave some room unused, the best ones first.

    Few sizes suit accelerators with few engines, and a little slack suits those with many.
    Copies of units, which must be apart, need an index for each accelerator.
    """
    if problem.bounds.rate_per_s:
        yield {
            kind.name: Packing(engine_sizes(problem, kind), None, indexed=kind.count > 1)
            for kind in problem.accelerators
        }
        return
    many = [count for count in _SIZES if count >= _MANY_SIZES]
    few = [count for count in _SIZES if count < _MANY_SIZES]
    for step in (*many, *_SLACK, *few):
        packings = {kind.name: _tight(problem, kind, step) for kind in problem.accelerators}
        if all(packing is not None for packing in packings.values()):
            yield {name: packing for name, packing in packings.items() if packing is not None}


def _tight(problem: Problem, kind: Accelerators, step: float) -> Packing | None:
    """Return a packing with `step` sizes, or larger by a factor; None with too many patterns."""
    exact = _packing(problem, kind)
    if exact.patterns is not None or kind.count == 1:
        return exact
    if step in _SLACK:
        larger = {name: math.ceil(size * step) for name, size in exact.sizes.items()}
        return Packing({n: min(size, kind.room_bytes) for n, size in larger.items()}, None)
    coarse = _rounded_up(exact.sizes, int(step), kind.room_bytes)
    patterns = maximal_patterns(list(coarse.values()), kind.room_bytes)
    return None if patterns is None else Packing(coarse, patterns)


def _rounded_up(sizes: Mapping[str, int], count: int, room: int) -> dict[str, int]:
    """Round sizes up to at most `count` of them, equally many to each."""
    order = sorted(set(sizes.values()))
    parts = np.array_split(np.array(order), min(count, len(order)))
    up = {int(size): int(part[-1]) for part in parts for size in part}
    return {name: min(up[size], room) for name, size in sizes.items()}


def _why_nothing_fits(problem: Problem, left_s: Callable[[], float]) -> str:
    """Find the bound without which something would fit, and what it would have to be."""
    bounds = problem.bounds
    causes: list[str] = []
    relaxations: list[tuple[str, Problem]] = []
    if math.isfinite(bounds.cost):
        relaxations.append(("cost", replace(problem, bounds=replace(bounds, cost=math.inf))))
    if math.isfinite(bounds.wait_s):
        relaxations.append(("wait", replace(problem, bounds=replace(bounds, wait_s=math.inf))))
    if math.isfinite(bounds.host_bytes):
        relaxed = replace(problem, bounds=replace(bounds, host_bytes=math.inf))
        relaxations.append(("host", relaxed))
    if bounds.rate_per_s:
        relaxations.append(("rate", replace(problem, bounds=replace(bounds, rate_per_s=0.0))))
    relaxations.append(("memory", _with_memory(problem, 4096.0)))
    for name, relaxed in relaxations:
        cheapest = relaxed if name != "cost" else _cheapest(relaxed)
        quickest = replace(cheapest, quality=cheapest.quality * 0.0, time_price=1.0)
        try:
            found = solve(
                quickest if name == "wait" else cheapest, time_limit_s=left_s(), explain=False
            )
        except CompositionError:
            continue
        causes.append(_cause(name, problem, found))
    if causes:
        return "no composition fits: " + "; or ".join(causes)
    names = {
        "cost": f"the budget of {bounds.cost:g} a request",
        "wait": f"the wait of {bounds.wait_s:g} s",
        "host": f"host memory of {bounds.host_bytes / _GIB:.4g} GiB",
        "rate": f"{bounds.rate_per_s:g} requests/s",
        "memory": f"the memory of {_memory_text(problem)}",
    }
    return f"no composition fits {', '.join(names[n] for n, _ in relaxations)} together"


def _cheapest(problem: Problem) -> Problem:
    most = max(float(problem.cost.max(initial=0.0)), 1e-12)
    return replace(problem, quality=-problem.cost / most, time_price=0.0)


def _with_memory(problem: Problem, factor: float) -> Problem:
    kinds = tuple(
        replace(kind, memory_bytes=int(kind.memory_bytes * factor)) for kind in problem.accelerators
    )
    return replace(problem, accelerators=kinds)


def _memory_text(problem: Problem) -> str:
    return ", ".join(f"{k.count} x {k.memory_bytes / _GIB:.4g} GiB" for k in problem.accelerators)


def _cause(name: str, problem: Problem, found: Composition) -> str:
    bounds: Bounds = problem.bounds
    if name == "cost":
        return (
            f"the budget is {bounds.cost:g} a request, and the cheapest composition within the "
            f"other bounds costs {found.cost:.6g}"
        )
    if name == "wait":
        least = max(found.wait_s.values())
        return (
            f"no category may wait longer than {bounds.wait_s:g} s for swaps, and the other bounds "
            f"allow a composition that waits {least:.4g} s"
        )
    if name == "host":
        return f"host memory is {bounds.host_bytes / _GIB:.4g} GiB, which is too little"
    if name == "rate":
        return f"{bounds.rate_per_s:g} requests/s are more than the accelerators can answer"
    least_bytes = min((u.size_bytes for u in problem.units), default=0)
    what = "the smallest expert"
    for expert in sorted(problem.required & problem.local):
        needed = min(u.size_bytes for u in problem.units if expert in u.experts)
        if needed >= least_bytes:
            least_bytes, what = needed, f"{expert!r}, which is required,"
    overhead = min((k.engine_bytes + k.replica_bytes for k in problem.accelerators), default=0)
    return (
        f"the memory is {_memory_text(problem)}, and {what} alone takes "
        f"{(least_bytes + overhead) / _GIB:.4g} GiB with its engine"
    )
