"""Every broken bound of a composition is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from loadtests.compose.random_problems import large
from router_models.composition.bound_verification import violations
from router_models.composition.composition_problem import Bounds, Problem, SwapMethod, Tier
from router_models.composition.composition_value import Composition
from router_models.composition.highs_solver import solve

PROBLEM = large(5, experts=12, categories=4, accelerators=3, cascades=6, wait_s=200)
FOUND = solve(PROBLEM)
ABSENT = min(PROBLEM.local - set(FOUND.experts))


def bounded(**bounds: float) -> Callable[[Problem, Composition], tuple[Problem, Composition]]:
    return lambda p, f: (replace(p, bounds=replace(p.bounds, **bounds)), f)


def held(**changes: object) -> Callable[[Problem, Composition], tuple[Problem, Composition]]:
    def change(problem: Problem, found: Composition) -> tuple[Problem, Composition]:
        first, *rest = found.holdings
        return problem, replace(found, holdings=(replace(first, **changes), *rest))

    return change


FIRST = FOUND.holdings[0]


@pytest.mark.parametrize(
    ("break_", "line"),
    [
        (bounded(cost=FOUND.cost * 0.9), "the mean cost is"),
        (lambda p, f: (p, replace(f, holdings=())), "is held nowhere"),
        (lambda p, f: (p, replace(f, quality=f.quality + 0.1)), "are told"),
        (lambda p, f: (p, replace(f, wait_s=dict.fromkeys(f.wait_s, 7.0))), "7 s are told"),
        (
            lambda p, f: (replace(p, required=frozenset({ABSENT})), f),
            f"{ABSENT}, which is required",
        ),
        (lambda p, f: (replace(p, exclusive=(frozenset(p.experts),)), f), "alternatives of one"),
        (held(replicas=4), "accelerators of 3"),
        (held(kind=replace(FIRST.kind, memory_bytes=1)), "of 1 bytes"),
        (held(residents=(*FIRST.residents, FIRST.residents[0])), "stands there twice"),
        (held(guests=((PROBLEM.units[0], Tier.RESPAWN),), slots=0), "guests without a slot"),
        (
            held(residents=PROBLEM.units[:3], slots=2),
            "3 at home in 2 slots",
        ),
        (
            held(
                kind=replace(FIRST.kind, method=SwapMethod.INPLACE),
                residents=(),
                guests=tuple((u, Tier.WARM) for u in FIRST.residents),
                slots=1,
            ),
            "family is at home",
        ),
        (
            held(residents=(replace(FIRST.residents[0], needs="e999"), *FIRST.residents[1:])),
            "is held without e999",
        ),
        (
            lambda p, f: (
                replace(p, bounds=Bounds(rate_per_s=100), busy_s=dict.fromkeys(p.experts, 1.0)),
                f,
            ),
            "busy for",
        ),
    ],
)
def test_violations_broken_bound_is_told(
    break_: Callable[[Problem, Composition], tuple[Problem, Composition]], line: str
) -> None:
    assert violations(PROBLEM, FOUND) == []
    problem, found = break_(PROBLEM, FOUND)
    assert any(line in told for told in violations(problem, found)), violations(problem, found)


def test_violations_host_memory_and_waits_are_bounded() -> None:
    kind = replace(PROBLEM.accelerators[0], method=SwapMethod.SLEEP)
    problem = replace(PROBLEM, accelerators=(kind,), bounds=Bounds(cost=PROBLEM.bounds.cost))
    small = sorted(problem.units, key=lambda unit: unit.size_bytes)[:8]
    problem = replace(problem, required=frozenset(e for u in small for e in u.experts))
    found = solve(problem)
    if not found.pinned_bytes:
        pytest.fail("this problem is meant to need guests")
    less = replace(problem, bounds=replace(problem.bounds, host_bytes=found.pinned_bytes - 1))
    assert any("host memory" in line for line in violations(less, found))
    least = replace(problem, bounds=replace(problem.bounds, wait_s=0.0))
    assert any("waits" in line for line in violations(least, found))
