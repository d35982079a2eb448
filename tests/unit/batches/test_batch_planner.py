"""The plan of a batch: which answerer each line gets, and when it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batches.batch_planner import BatchPlanner, LineEstimates, run_order, runs_at_once
from service.batches.batch_types import BatchLine, BatchTerms, LineChoice
from service.broker.batch_knapsack import BatchOptions
from service.errors import InvalidRequestError, RateLimitExceededError
from service.types import NOBODY, Tenant

NEVER = np.inf


class Fixed:
    """An estimator with given figures."""

    def __init__(self, found: LineEstimates) -> None:
        self.found = found

    async def estimate(self, endpoint, lines, tenant) -> LineEstimates:
        return self.found


def estimates(lines: int = 12, seed: int = 0) -> LineEstimates:
    """Two experts and a cascade of both, on one engine with the first one resident."""
    rng = np.random.default_rng(seed)
    quality = np.column_stack(
        [rng.uniform(0, 0.5, lines), rng.uniform(0.3, 1, lines), np.full(lines, 0.99)]
    )
    cost = np.column_stack([np.full(lines, 1.0), np.full(lines, 3.0), np.full(lines, 3.5)])
    calls = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.5]])
    return LineEstimates(
        np.arange(lines),
        ("small", "big", "both"),
        ("small", "big"),
        BatchOptions(
            quality, cost, np.ones_like(cost, dtype=bool), np.full((lines, 2), 0.5), calls
        ),
        np.full((lines, 3), 100.0),
        np.array([[0.0, 5.0]]),
        np.arange(2),
        tuple(f"{'abc'[i % 3]} prompt {i}" for i in range(lines)),
        np.arange(lines) % 2,
    )


async def test_plan_groups_lines_by_expert_resident_first_and_keeps_the_budget() -> None:
    found = estimates()
    plan = await BatchPlanner(Fixed(found)).plan("/x", [], BatchTerms(max_cost=24), NOBODY)
    assert sorted(choice.line for choice in plan.choices) == list(range(12))
    assert plan.cost <= 24
    assert plan.cost == pytest.approx(sum(choice.cost for choice in plan.choices))
    assert plan.quality == pytest.approx(np.mean([choice.quality for choice in plan.choices]))
    runs = [name for name, _ in groupby(choice.model for choice in plan.choices)]
    assert runs == ["small", "big"]  # the cascade would swap for every line
    for _, lines in groupby(plan.choices, key=lambda choice: choice.model):
        prompts = [found.prompts[choice.line] for choice in lines]
        assert prompts == sorted(prompts)


async def test_plan_takes_recipes_whose_experts_are_resident_together() -> None:
    found = replace(estimates(), load_s=np.array([[0.0, NEVER], [NEVER, 0.0]]))
    plan = await BatchPlanner(Fixed(found)).plan("/x", [], BatchTerms(), NOBODY)
    assert {choice.model for choice in plan.choices} == {"both"}


async def test_plan_quality_is_a_part_of_the_best_at_least_cost() -> None:
    found = estimates()
    planner = BatchPlanner(Fixed(found))
    best = await planner.plan("/x", [], BatchTerms(), NOBODY)
    part = await planner.plan("/x", [], BatchTerms(quality=0.8), NOBODY)
    assert 0.8 * best.quality <= part.quality * (1 + 1e-9) < best.quality
    assert part.cost < best.cost


async def test_plan_lines_without_an_answerer_run_as_they_are() -> None:
    strange = LineChoice(99, "nobody", 0.0, 0.0, 0.0)
    found = replace(estimates(), unplanned=(strange,))
    plan = await BatchPlanner(Fixed(found)).plan("/x", [], BatchTerms(), NOBODY)
    assert strange in plan.choices
    assert len(plan.choices) == 13


@pytest.mark.parametrize(
    ("terms", "param", "words"),
    [
        (BatchTerms(max_cost=11.9), "coe.max_cost", "the cheapest choice costs 12"),
        (BatchTerms(deadline_s=3), "coe.deadline", "6"),
    ],
)
async def test_plan_terms_that_nothing_keeps_are_refused(terms, param, words) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        await BatchPlanner(Fixed(estimates())).plan("/x", [], terms, NOBODY)
    assert raised.value.param == param


async def test_forecast_is_a_rising_curve_with_the_terms_own_point() -> None:
    outlook = await BatchPlanner(Fixed(estimates())).forecast(
        "/x", [], BatchTerms(max_cost=24), NOBODY
    )
    qualities = [point.quality for point in outlook.curve]
    assert qualities == sorted(qualities)
    assert len(qualities) > 4
    for point in outlook.curve:
        assert point.cost <= point.max_cost * (1 + 1e-9)
        assert sum(point.shares.values()) == pytest.approx(1)
    assert outlook.plan is not None
    assert outlook.plan.cost <= 24
    infeasible = await BatchPlanner(Fixed(estimates())).forecast(
        "/x", [], BatchTerms(max_cost=1), NOBODY
    )
    assert infeasible.plan is None
    assert "cheapest" in (infeasible.problem or "")
    assert infeasible.curve


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), engines=st.integers(1, 3), experts=st.integers(1, 5))
def test_run_order_loads_each_expert_once_and_names_every_line_once(seed, engines, experts) -> None:
    rng = np.random.default_rng(seed)
    lines = 40
    first = rng.integers(0, experts, lines)
    load_s = np.where(rng.uniform(size=(engines, experts)) < 0.3, 0.0, 4.0)
    load_s[rng.uniform(size=load_s.shape) < 0.3] = NEVER
    load_s[0, ~np.isfinite(load_s).any(axis=0)] = 4.0
    work_s = rng.uniform(0.1, 2, lines)
    prompts = [f"{rng.integers(0, 5)}" for _ in range(lines)]
    order = run_order(first, work_s, prompts, load_s, np.arange(experts))
    assert sorted(order.tolist()) == list(range(lines))
    if engines == 1:
        runs = [expert for expert, _ in groupby(first[order].tolist())]
        assert len(runs) == len(set(runs))
        resident = [load_s[0, expert] == 0 for expert in runs]
        assert resident == sorted(resident, reverse=True)
    for expert in range(experts):
        own = [line for line in order.tolist() if first[line] == expert]
        short = len(own) // 5
        begun, last = own[: len(own) - short], own[len(own) - short :]
        assert [prompts[line] for line in begun] == sorted(prompts[line] for line in begun)
        assert work_s[last].tolist() == sorted(np.sort(work_s[own])[:short], reverse=True)


def test_run_order_gives_several_engines_work_at_the_same_time() -> None:
    first = np.array([0] * 10 + [1] * 10)
    load_s = np.array([[0.0, NEVER], [NEVER, 0.0]])
    order = run_order(first, np.ones(20), ["p"] * 20, load_s, np.arange(2))
    assert sorted(first[order][:10].tolist()) == [0] * 5 + [1] * 5


def test_run_order_variants_of_one_base_stand_together() -> None:
    first = np.array([0, 1, 2, 0, 1, 2])
    load_s = np.array([[5.0, 5.0, 5.0]])
    order = run_order(first, np.ones(6), ["p"] * 6, load_s, np.array([0, 1, 0]))
    units = [expert % 2 for expert, _ in groupby(first[order].tolist())]
    assert len([unit for unit, _ in groupby(units)]) == 2


@pytest.mark.parametrize(
    ("load_s", "weights", "fits"),
    [
        ([[0.0, 5.0]], [0, 1], False),
        ([[0.0, 0.0]], [0, 0], True),
        ([[0.0, 5.0], [NEVER, 5.0]], [0, 1], True),
        ([[0.0, NEVER], [0.0, NEVER]], [0, 1], False),
    ],
)
def test_runs_at_once(load_s, weights, fits) -> None:
    calls = np.array([[1.0, 0.3]])
    assert runs_at_once(calls, np.array(load_s), np.array(weights)).tolist() == [fits]


async def test_forecasts_of_tenants_take_turns_and_are_bounded() -> None:
    order: list[str] = []

    class Noted(Fixed):
        async def estimate(
            self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
        ) -> LineEstimates:
            order.append(tenant.name)
            await asyncio.sleep(0)
            return self.found

    planner = BatchPlanner(Noted(replace(estimates(), numbers=np.array([], dtype=np.intp))))
    many, one = Tenant("many"), Tenant("one")

    async def ask(tenant: Tenant) -> None:
        async with planner.asked_by(tenant):
            await planner.forecast("/x", [], BatchTerms(), tenant)

    asked = [asyncio.create_task(ask(many)) for _ in range(9)] + [asyncio.create_task(ask(one))]
    made = await asyncio.gather(*asked, return_exceptions=True)
    refused = [each for each in made if each is not None]
    assert [type(each) for each in refused] == [RateLimitExceededError]
    assert order == ["many", "one", *["many"] * 7]
    await ask(many)
