"""The batch knapsack against brute force and linear-programming bounds."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from service.broker.batch_knapsack import (
    BatchBounds,
    BatchInfeasibleError,
    BatchOptions,
    least_cost,
    shortest_s,
    solve,
)

RESIDENT = np.zeros((1, 3))


def options(seed: int, lines: int, recipes: int, *, kinds: int | None = None) -> BatchOptions:
    """Random options; the first recipes are single experts, the last one asks two."""
    rng = np.random.default_rng(seed)
    experts = 3
    calls = np.zeros((recipes, experts))
    for r in range(recipes):
        calls[r, r % experts] = 1.0
    calls[-1] = [1.0, 0.4, 0.0]
    rows = kinds or lines
    of = rng.integers(0, rows, lines)
    quality = rng.uniform(0, 1, (rows, recipes)).round(3)[of]
    cost = rng.uniform(0.1, 3, (rows, recipes)).round(3)[of]
    possible = (rng.uniform(0, 1, (rows, recipes)) < 0.8)[of]
    possible[:, 0] = True
    seconds = rng.uniform(0.1, 2, (rows, experts)).round(3)[of]
    return BatchOptions(quality, cost, possible, seconds, calls)


def brute(batch: BatchOptions, load_s: np.ndarray, max_cost: float, deadline_s: float):
    """All feasible choices as (quality, cost). With one engine the time is a plain sum."""
    lines, recipes = batch.quality.shape
    for choice in product(range(recipes), repeat=lines):
        if not all(batch.possible[line, r] for line, r in enumerate(choice)):
            continue
        picked = np.array(choice)
        at = np.arange(lines)
        work = (batch.calls[picked] * batch.seconds).sum(axis=0)
        time_s = work.sum() + load_s[0, work > 0].sum()
        cost = batch.cost[at, picked].sum()
        if cost <= max_cost + 1e-12 and time_s <= deadline_s + 1e-12:
            yield batch.quality[at, picked].sum(), cost


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lines=st.integers(1, 6),
    tightness=st.floats(0, 1),
    hurry=st.one_of(st.none(), st.floats(0.3, 1.0)),
    share=st.one_of(st.none(), st.floats(0.5, 1.0)),
)
def test_solve_is_the_best_of_all_choices(seed, lines, tightness, hurry, share):
    batch = options(seed, lines, 4)
    load_s = np.array([[0.0, 1.5, 0.7]])
    dearest = float(np.where(batch.possible, batch.cost, 0).max(axis=1).sum())
    cheapest = least_cost(batch)
    max_cost = cheapest + tightness * (dearest - cheapest)
    free = solve(batch, load_s, BatchBounds(max_cost))
    deadline_s = math.inf if hurry is None else hurry * free.seconds
    every = list(brute(batch, load_s, max_cost, deadline_s))
    if not every:
        with pytest.raises(BatchInfeasibleError) as raised:
            solve(batch, load_s, BatchBounds(max_cost, deadline_s))
        assert raised.value.term == "deadline"
        assert raised.value.nearest > deadline_s * (1 - 1e-3)
        return
    found = solve(batch, load_s, BatchBounds(max_cost, deadline_s, share))
    assert found.cost <= max_cost * (1 + 1e-12)
    assert found.seconds <= deadline_s * (1 + 1e-9)
    assert batch.possible[np.arange(lines), found.chosen].all()
    best = max(quality for quality, _ in every)
    if share is None:
        assert found.quality == pytest.approx(best, abs=1e-6)
        assert found.bound >= found.quality
        return
    least = min(cost for quality, cost in every if quality >= share * best * (1 - 1e-9))
    assert found.quality >= share * best * (1 - 1e-6)
    assert found.cost == pytest.approx(least, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tightness=st.floats(0.01, 0.99), kinds=st.integers(1, 40))
def test_solve_reaches_the_linear_bound_but_for_one_line(seed, tightness, kinds):
    batch = options(seed, 200, 5, kinds=kinds)
    free = solve(batch, RESIDENT, BatchBounds())
    cheapest = least_cost(batch)
    max_cost = cheapest + tightness * (free.cost - cheapest)
    found = solve(batch, RESIDENT, BatchBounds(max_cost))
    lines, recipes = batch.quality.shape
    cells = [(line, r) for line in range(lines) for r in range(recipes) if batch.possible[line, r]]
    equal = np.zeros((lines, len(cells)))
    for column, (line, _) in enumerate(cells):
        equal[line, column] = 1
    relaxed = linprog(
        [-batch.quality[cell] for cell in cells],
        A_ub=[[batch.cost[cell] for cell in cells]],
        b_ub=[max_cost],
        A_eq=equal,
        b_eq=np.ones(lines),
    )
    bound = -relaxed.fun
    assert found.quality <= bound + 1e-6
    assert found.quality >= bound - 1.0  # a relaxed solution divides at most one line
    assert found.bound == pytest.approx(found.quality, rel=1e-6)
    assert found.exact
    assert found.cost <= max_cost * (1 + 1e-11)


def test_solve_twenty_thousand_distinct_lines_in_seconds_within_the_budget():
    rng = np.random.default_rng(0)
    lines, experts = 20_000, 16
    quality = np.clip(rng.normal(0.5, 0.2, (lines, experts)), 0, 1)
    price = np.geomspace(0.1, 10, experts)
    cost = price * rng.lognormal(0, 0.5, (lines, 1)) * rng.lognormal(0, 0.3, (lines, experts))
    batch = BatchOptions(
        quality, cost, np.ones_like(cost, dtype=bool), 0.01 * cost / price, np.eye(experts)
    )
    free = solve(batch, np.zeros((1, experts)), BatchBounds())
    began = time.process_time()
    found = solve(batch, np.zeros((1, experts)), BatchBounds(0.3 * free.cost))
    assert time.process_time() - began < 20
    assert found.cost <= 0.3 * free.cost
    assert found.quality >= 0.99999 * found.bound


def test_solve_many_lines_in_a_hurry_keeps_deadline_and_budget_near_the_bound():
    rng = np.random.default_rng(1)
    lines, experts = 1_200, 6
    quality = np.clip(rng.normal(0.5, 0.2, (lines, experts)), 0, 1)
    cost = rng.lognormal(0, 0.5, (lines, experts))
    seconds = np.linspace(0.05, 0.4, experts) * rng.lognormal(0, 0.3, (lines, 1))
    batch = BatchOptions(quality, cost, np.ones_like(cost, dtype=bool), seconds, np.eye(experts))
    load_s = np.full((2, experts), 8.0)
    load_s[0, 0] = load_s[1, 1] = 0.0
    free = solve(batch, load_s, BatchBounds())
    found = solve(batch, load_s, BatchBounds(0.7 * free.cost, 0.7 * free.seconds))
    assert found.cost <= 0.7 * free.cost
    assert found.seconds <= 0.7 * free.seconds * (1 + 1e-9)
    assert found.quality >= 0.95 * found.bound
    assert found.quality < free.quality


def test_a_deadline_leaves_out_an_expert_whose_load_would_not_pay():
    quality = np.array([[0.5, 0.9]] * 4)
    batch = BatchOptions(
        quality, np.ones((4, 2)), np.ones((4, 2), dtype=bool), np.ones((4, 2)), np.eye(2)
    )
    load_s = np.array([[0.0, 10.0]])
    assert set(solve(batch, load_s, BatchBounds()).chosen) == {1}
    hurried = solve(batch, load_s, BatchBounds(deadline_s=13.0))
    assert set(hurried.chosen) == {0}
    assert hurried.seconds == 4.0


@pytest.mark.parametrize(
    ("bounds", "term", "nearest"),
    [(BatchBounds(max_cost=1.5), "max_cost", 2.0), (BatchBounds(deadline_s=1.0), "deadline", 2.0)],
)
def test_bounds_that_nothing_keeps_are_refused_with_the_nearest(bounds, term, nearest):
    ones = np.ones((2, 1))
    batch = BatchOptions(ones * 0.5, ones, ones > 0, ones, np.eye(1))
    with pytest.raises(BatchInfeasibleError) as raised:
        solve(batch, np.zeros((1, 1)), bounds)
    assert raised.value.term == term
    assert raised.value.nearest == pytest.approx(nearest, rel=1e-2)


def test_a_line_without_a_recipe_is_named():
    ones = np.ones((2, 1))
    possible = np.array([[True], [False]])
    with pytest.raises(BatchInfeasibleError, match="line 1") as raised:
        solve(BatchOptions(ones, ones, possible, ones, np.eye(1)), np.zeros((1, 1)), BatchBounds())
    assert raised.value.term == "lines"


def test_an_expert_that_no_engine_holds_answers_nothing():
    batch = BatchOptions(
        np.array([[0.2, 0.9]]),
        np.ones((1, 2)),
        np.ones((1, 2), dtype=bool),
        np.ones((1, 2)),
        np.eye(2),
    )
    found = solve(batch, np.array([[0.0, np.inf]]), BatchBounds())
    assert found.chosen.tolist() == [0]


@pytest.mark.parametrize(
    ("work", "load", "expected"),
    [
        ([4.0, 2.0], [[0.0, 1.0]], 7.0),
        ([4.0, 0.0], [[0.0, 1.0]], 4.0),
        ([4.0], [[0.0], [0.0]], 2.0),
        ([4.0], [[0.0], [3.0]], 3.5),
        ([4.0], [[0.0], [9.0]], 4.0),
        ([4.0, 4.0], [[0.0, np.inf], [np.inf, 0.0]], 4.0),
    ],
)
def test_shortest_time_of_engines(work, load, expected):
    assert shortest_s(np.array(work), np.array(load)) == pytest.approx(expected, rel=0.02)
