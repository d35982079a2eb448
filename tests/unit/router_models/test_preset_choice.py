"""Rules for a preset's price of cost: made-up frontiers, and bounds by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_models.frontier_evaluation import comparison
from router_models.preset_choice import (
    KAPPAS,
    MAX_POINT_COST,
    RULES,
    Played,
    Rule,
    choose,
    choose_own,
    general_choice,
    judge_own,
    least_costs,
    play_compared,
    point_cost,
)
from router_models.two_stage_fit import Predicted
from tests.unit.router_models.test_frontier_evaluation import played as alone
from tests.unit.router_models.test_frontier_evaluation import table


def played(loss: float, gain: float = 0.0) -> Played:
    """Twenty rows on which κ loses `loss` points a κ of 0.1, from `gain` points above the best."""
    score = 0.5 + (gain - loss * 10 * KAPPAS) / 100
    half = np.arange(20) % 2 == 0
    return Played(
        name="made up",
        best="large",
        chosen_on=half,
        prompts=np.arange(20),
        score=np.repeat(score[:, None], 20, axis=1),
        cost=np.repeat((1 - KAPPAS / 2)[:, None], 20, axis=1),
        best_score=np.full(20, 0.5),
        best_cost=np.ones(20),
    )


@pytest.mark.parametrize(
    ("losses", "rule", "kappa"),
    [
        ([(10.0, 0.0)], Rule(1.0), 0.01),
        # The data set that loses most decides.
        ([(10.0, 0.0), (1.0, 0.0)], Rule(1.0), 0.01),
        # A router above the best single expert may give that up as well, unless the peak counts.
        ([(10.0, 4.0)], Rule(1.0), 0.05),
        ([(10.0, 4.0)], Rule(1.0, of_peak=True), 0.01),
        # Nothing passes: cost has no weight.
        ([(10.0, -3.0)], Rule(1.0), 0.0),
    ],
)
def test_choose_takes_the_greatest_saving_within_the_rule(
    losses: list[tuple[float, float]], rule: Rule, kappa: float
) -> None:
    found = KAPPAS[choose([played(*one) for one in losses], rule)]
    below = KAPPAS[kappa + 1e-12 >= KAPPAS]
    assert found == below[-1]


def test_choose_reads_no_row_that_is_kept_apart() -> None:
    one = played(10.0, 2.0)
    noise = np.where(one.chosen_on, 0.0, np.random.default_rng(0).normal(size=one.score.shape))
    other = replace(one, score=one.score + noise)
    for rule in RULES.values():
        assert choose([one], rule) == choose([other], rule)


@pytest.mark.parametrize(
    ("kappa", "share"),
    [(0.05, 0.2), (0.0464, 0.22), (0.1468, 0.069), (0.00464, 2.2), (0.01, 1.0), (0.0, 1000.0)],
)
def test_point_cost_is_rounded_up_to_two_digits(kappa: float, share: float) -> None:
    assert point_cost(kappa) == pytest.approx(share)
    assert point_cost(kappa) <= MAX_POINT_COST


def shaped(lead: float, slope: float, cost: float, rows: int = 400) -> Played:
    """Lead in points falls by `slope` a decade from κ = 0.01 on, and cost by a third of itself."""
    decades = np.clip(np.log10(np.maximum(KAPPAS, 1e-9) / 0.01), 0, None)
    score = 0.5 + (lead - slope * decades) / 100
    return Played(
        name="made up",
        best="large",
        chosen_on=np.ones(rows, dtype=bool),
        prompts=np.arange(rows),
        score=np.repeat(score[:, None], rows, axis=1),
        cost=np.repeat((cost * (1 - decades / 3))[:, None], rows, axis=1),
        best_score=np.full(rows, 0.5),
        best_cost=np.ones(rows),
    )


@pytest.mark.parametrize("cost", [0.3, 0.76, 0.9, 1.5])
@pytest.mark.parametrize("slope", [0.0, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("lead", [-3.0, 0.0, 2.0, 10.0])
def test_choose_own_keeps_equal_quality_and_moves_only_for_a_reason(
    lead: float, slope: float, cost: float
) -> None:
    one = shaped(lead, slope, cost)
    every = np.ones(400, dtype=bool)
    found, leads, shares = choose_own(one, every), one.lead(every), one.share(every)
    assert found["best"] <= found["auto"] <= found["fast"]
    auto, general = found["auto"], general_choice("auto")
    if leads.max() >= -1:
        assert leads[auto] >= -1
    if leads[general] < -1:
        assert auto < general
    elif shares[general] <= 0.76:
        assert auto == min(general, found["fast"])
    elif auto > general:
        # It gives up no more than reaching the target takes.
        assert shares[auto - 1] > 0.76
    if general < auto:
        assert shares[auto] <= 0.76


def test_choose_own_counts_a_lead_less_its_error() -> None:
    """Few prompts prove no equal quality."""
    draw = np.random.default_rng(0)
    sure, few = shaped(0.0, 1.0, 1.2), shaped(0.0, 1.0, 1.2, rows=40)
    noisy = replace(few, best_score=draw.integers(0, 2, 40).astype(float))
    noisy = replace(noisy, best_score=noisy.best_score - noisy.best_score.mean() + 0.5)
    assert choose_own(sure, np.ones(400, dtype=bool))["auto"] > 0
    assert choose_own(noisy, np.ones(40, dtype=bool))["auto"] == 0


def test_judge_own_judges_prompts_that_did_not_choose() -> None:
    draw = np.random.default_rng(1)
    one = shaped(1.0, 1.0, 1.2, rows=1000)
    # On random outcomes the choice by all prompts looks better than it is on others.
    noise = draw.normal(0, 0.3, one.score.shape)
    found = judge_own(replace(one, score=one.score + noise))
    for preset in found.values():
        low, high = preset.lead_interval
        assert low < preset.lead < high
        assert 3 < high - low < 5
        assert preset.cost_interval[0] <= preset.cost <= preset.cost_interval[1]


@pytest.mark.parametrize("seed", range(5))
def test_least_costs_bound_every_choice_of_equal_quality(seed: int) -> None:
    draw = np.random.default_rng(seed)
    right = (draw.random((60, 3)) < [0.4, 0.5, 0.7]).astype(float)
    given = table(right, np.tile([1.0, 2.0, 10.0], (60, 1)))
    given = replace(given, categories=tuple("ab"[i % 2] for i in range(60)))
    results = alone(given)
    uniform = Predicted(np.ones((60, 1)), np.full((60, 3), 0.5), results.cost)
    compared = comparison(given, results, uniform)
    found = least_costs(compared)
    alike, by_category, by_prompt = found.values()
    assert by_prompt is not None
    assert by_category is not None
    assert alike is not None
    assert by_prompt <= by_category + 1e-9 <= alike + 2e-9 <= 1 + 3e-9
    # No way of choosing a recipe for each category is cheaper at that quality.
    best = int(given.score.mean(axis=0).argmax())
    category = np.arange(60) % 2
    for a in range(3):
        for b in range(3):
            choice = np.where(category == 0, a, b)
            score = given.score[np.arange(60), choice].mean()
            if score >= given.score[:, best].mean() - 0.01:
                cost = given.cost[np.arange(60), choice].mean()
                assert cost / given.cost[:, best].mean() >= by_category - 1e-9
    reference = np.full(60, 10.0)
    assert play_compared("x", compared, reference, np.ones(60, dtype=bool)).best == f"e{best}"
