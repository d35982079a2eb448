"""The exact program against every composition tried by hand, and its limits told truthfully."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy.optimize import OptimizeResult, milp

from loadtests.compose.brute_force import best_value
from loadtests.compose.random_problems import large, small
from router_models.composition.bound_verification import violations
from router_models.composition.composition_problem import (
    Accelerators,
    Bounds,
    Problem,
    SwapMethod,
    Unit,
)
from router_models.composition.engine_packings import maximal_patterns
from router_models.composition.highs_solver import ROUNDING, CompositionError, solve
from service.types import Recipe

GIB = 1024**3
MILP = "router_models.composition.highs_solver.milp"


@pytest.mark.parametrize("batch", range(6))
def test_solve_small_problem_finds_what_trying_all_compositions_finds(batch: int) -> None:
    exact = 0
    for seed in range(1000 + 15 * batch, 1015 + 15 * batch):
        problem = small(seed)
        best = best_value(problem)
        if best is None:
            with pytest.raises(CompositionError, match="no composition fits"):
                solve(problem)
            continue
        found = solve(problem)
        assert found.exact, seed
        assert found.gap == 0
        assert found.value == pytest.approx(best, abs=2 * ROUNDING), seed
        assert violations(problem, found) == []
        exact += 1
    assert exact


@pytest.mark.parametrize("distinct", [False, True])
def test_solve_large_problem_keeps_to_every_bound_and_tells_a_valid_gap(distinct: bool) -> None:
    problem = large(
        3, experts=30, categories=8, accelerators=4, cascades=10, wait_s=60, distinct=distinct
    )
    found = solve(problem, time_limit_s=30, gap=0.01)
    assert violations(problem, found) == []
    assert found.gap <= 0.02 * found.value
    best = solve(problem, time_limit_s=30)
    assert best.value <= found.value + found.gap + ROUNDING
    assert best.value >= found.value - 1e-9 - best.gap


def test_solve_sizes_with_too_many_patterns_tell_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(maximal_patterns, most=4)
    inexact = 0
    for seed in range(6):
        problem = large(seed, experts=12, categories=4, accelerators=3, cascades=4, distinct=True)
        best = solve(problem)
        assert best.exact
        with monkeypatch.context() as patch:
            patch.setattr("router_models.composition.highs_solver.maximal_patterns", few)
            found = solve(problem)
        assert violations(problem, found) == []
        assert found.value <= best.value + ROUNDING
        assert found.value + found.gap >= best.value - ROUNDING
        inexact += not found.exact
    assert inexact


def test_solve_interrupted_search_is_never_called_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = large(1, experts=40, categories=10, accelerators=4, cascades=20)
    best = solve(problem)

    def cut_short(*args: Any, options: dict[str, Any], **more: Any) -> Any:
        return milp(*args, options={**options, "node_limit": 1}, **more)

    monkeypatch.setattr(MILP, cut_short)
    found = solve(problem)
    assert found.value <= best.value + best.gap + ROUNDING
    assert found.value + found.gap >= best.value - ROUNDING
    if found.value < best.value - ROUNDING:
        assert not found.exact
    assert found.exact or found.gap > 0


def test_solve_timeout_without_a_composition_does_not_claim_that_none_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none_found(*_: Any, **__: Any) -> Any:
        return OptimizeResult(x=None, status=1, message="Time limit reached.", mip_dual_bound=None)

    monkeypatch.setattr(MILP, none_found)
    with pytest.raises(CompositionError, match="in 2 s; that none exists is not proven"):
        solve(small(0), time_limit_s=2)


def test_solve_solver_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(*_: Any, **__: Any) -> Any:
        return OptimizeResult(x=None, status=4, message="Numerical trouble.", mip_dual_bound=None)

    monkeypatch.setattr(MILP, failed)
    with pytest.raises(CompositionError, match="Numerical trouble"):
        solve(small(0))


def plain(**changes: Any) -> Problem:
    """Two experts of 4 and 6 GiB on one accelerator of 8 GiB; the larger one is better."""
    recipes = (Recipe("single", ("a",)), Recipe("single", ("b",)))
    problem = Problem(
        categories=("x", "y"),
        recipes=recipes,
        share=np.array([0.5, 0.5]),
        quality=np.array([[0.4, 0.8], [0.5, 0.6]]),
        cost=np.array([[1.0, 3.0], [1.0, 3.0]]),
        reach=np.ones((2, 2, 1)),
        units=(
            Unit("a", ("a",), 4 * GIB, "f", swap_s=1, load_s=4, start_s=10),
            Unit("b", ("b",), 6 * GIB, "f", swap_s=1, load_s=4, start_s=10),
        ),
        accelerators=(Accelerators("one", 1, 8 * GIB),),
    )
    return replace(problem, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bounds": Bounds(cost=0.5)},
            r"the budget is 0\.5 a request, and the cheapest .* costs 1",
        ),
        (
            {"accelerators": (Accelerators("one", 1, 3 * GIB),)},
            r"the memory is 1 x 3 GiB, and the smallest expert alone takes 4 GiB",
        ),
        (
            {
                "accelerators": (Accelerators("one", 1, 5 * GIB),),
                "required": frozenset({"b"}),
            },
            r"'b', which is required, alone takes 6 GiB",
        ),
        (
            {
                "required": frozenset({"a", "b"}),
                "bounds": Bounds(wait_s=5),
            },
            r"no category may wait longer than 5 s for swaps",
        ),
        (
            {
                "accelerators": (Accelerators("one", 1, 8 * GIB, method=SwapMethod.SLEEP),),
                "required": frozenset({"a", "b"}),
                "bounds": Bounds(host_bytes=9 * GIB),
            },
            r"host memory is 9 GiB, which is too little",
        ),
        (
            {"bounds": Bounds(rate_per_s=10), "busy_s": {"a": 1.0, "b": 1.0}},
            r"10 requests/s are more than the accelerators can answer",
        ),
        (
            {
                "bounds": Bounds(cost=0.5, rate_per_s=10),
                "busy_s": {"a": 1.0, "b": 1.0},
            },
            r"no composition fits the budget of 0\.5 a request, 10 requests/s, the memory of "
            r"1 x 8 GiB together",
        ),
    ],
)
def test_solve_infeasible_problem_names_the_bound(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        solve(plain(**changes))


def test_solve_price_of_waiting_decides_whether_experts_take_turns() -> None:
    best_apart = np.array([[0.4, 0.8], [0.9, 0.6]])
    cheap = solve(plain(quality=best_apart, time_price=0.001))
    assert {category: recipe.name for category, recipe in cheap.recipes.items()} == {
        "x": "b",
        "y": "a",
    }
    assert cheap.mean_wait_s > 0
    alone = solve(plain(quality=best_apart, time_price=10.0))
    assert {recipe.name for recipe in alone.recipes.values()} == {"b"}
    assert alone.mean_wait_s == 0
    # With a tight budget both are needed, and one of them is a guest.
    both = solve(plain(time_price=0.001, bounds=Bounds(cost=2.0)))
    (held,) = both.holdings
    assert held.slots == 1
    assert len(held.guests) == 1
    assert both.mean_wait_s == pytest.approx(10.0)  # half the requests, out of and back to home


def test_solve_category_without_traffic_gets_the_best_of_what_is_held() -> None:
    problem = plain(share=np.array([1.0, 0.0]), quality=np.array([[0.4, 0.8], [0.5, 0.6]]))
    assert solve(problem).recipes["y"].name == "b"
    # An alternative of what is used already is no choice for it.
    apart = plain(
        share=np.array([1.0, 0.0]),
        quality=np.array([[0.9, 0.8], [0.5, 0.6]]),
        accelerators=(Accelerators("one", 2, 8 * GIB),),
        exclusive=(frozenset({"a", "b"}),),
    )
    found = solve(apart)
    assert violations(apart, found) == []
    assert found.recipes["y"].name == "a"


def test_solve_remote_expert_needs_no_memory() -> None:
    problem = plain(units=plain().units[:1], remote=frozenset({"b"}))
    found = solve(problem)
    assert {recipe.name for recipe in found.recipes.values()} == {"b"}
    assert found.used_bytes == 0


def test_solve_rate_buys_copies_on_different_accelerators() -> None:
    problem = plain(
        accelerators=(Accelerators("one", 4, 8 * GIB),),
        bounds=Bounds(rate_per_s=1.0, cost=1.0),
        busy_s={"a": 2.0, "b": 2.0},
    )
    found = solve(problem)
    assert violations(problem, found) == []
    assert sum(held.replicas for held in found.holdings) == 3  # 2 s/s at 70 %


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": np.zeros((1, 2))}, "quality: the shape"),
        ({"share": np.array([1.0, -1.0])}, "share"),
        ({"units": plain().units[:1]}, "no size is given for b"),
        ({"required": frozenset({"c"})}, "no size is given for c, which is required"),
        ({"bounds": Bounds(rate_per_s=1)}, "no busy seconds of a"),
        ({"units": plain().units * 2}, "names must be unique"),
        ({"accelerators": (Accelerators("cpu", 2, GIB, unified=True),)}, "there is one machine"),
    ],
)
def test_problem_that_does_not_fit_together_raises(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(**changes)


def _with_a_hot_expert(rate: float) -> Problem:
    names = ("hot", "b", "c", "d")
    recipes = tuple(Recipe("single", (name,)) for name in names)
    quality = np.full((4, 4), 0.3)
    np.fill_diagonal(quality, 0.9)
    return Problem(
        categories=names,
        recipes=recipes,
        share=np.array([0.7, 0.1, 0.1, 0.1]),
        quality=quality,
        cost=np.zeros((4, 4)),
        reach=np.ones((4, 4, 1)),
        units=tuple(Unit(name, (name,), 7 * GIB, "family") for name in names),
        accelerators=(
            Accelerators("gpu", 4, 24 * GIB, engine_bytes=GIB, method=SwapMethod.INPLACE),
        ),
        bounds=Bounds(rate_per_s=rate),
        busy_s=dict.fromkeys(names, 0.5),
        time_price=0.01,
    )


def test_solve_hot_expert_gets_copies_and_then_a_pool_of_its_own() -> None:
    """The load of one expert grows, until the accelerators can't keep up."""
    copies, alone, several = [], [], []
    for rate in np.arange(0.5, 5.6, 0.5):
        problem = _with_a_hot_expert(float(rate))
        found = solve(problem)
        assert violations(problem, found) == [], rate
        assert found.quality == pytest.approx(0.9)
        used = sum(held.replicas for held in found.holdings)
        assert 0.5 * rate <= 0.7 * used, "the accelerators that are used keep up"
        hot = [held for held in found.holdings if any(u.name == "hot" for u in held.units)]
        copies.append(sum(held.replicas for held in hot))
        alone.append(any(len(held.units) == 1 for held in hot))
        several.append(len(hot) > 1)
        assert 0.5 * 0.7 * rate <= 0.7 * copies[-1]
    assert copies == sorted(copies)
    assert copies[0] == 1
    assert copies[-1] == 3
    assert alone[-1]
    assert several[-1], "one of its pools is its own"
    with pytest.raises(CompositionError, match="more than the accelerators can answer"):
        solve(_with_a_hot_expert(6.0))
