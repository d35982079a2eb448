"""Joining stages, and the least confidence."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from router_models.stage_fit import (
    FitOptions,
    FitSet,
    calibrate,
    calibrate_beside,
    calibrate_out_of_fold,
    figures_line,
    fit_stages,
    join,
    measured,
    min_confidence,
)
from service.classifier.linear_heads import log_softmax


def _logits(sure: float, right: int, wrong: int) -> NDArray[np.float64]:
    """Two labels: `right` rows that say 0, `wrong` rows that say 1."""
    return np.array([[sure, 0.0]] * right + [[0.0, sure]] * wrong)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_join_does_not_depend_on_the_scale_of_the_logits(scale: float) -> None:
    truth = np.zeros(100, dtype=np.int64)
    earlier = log_softmax(_logits(1.0, 60, 40))
    own = _logits(1.0, 80, 20)
    first, other = join(earlier, own, truth), join(earlier, scale * own, truth)
    assert np.isclose(first.own, other.own * scale, rtol=0.05)
    assert np.isclose(first.earlier, other.earlier, rtol=0.05)


def test_join_gives_calibrated_confidence() -> None:
    draw = np.random.default_rng(5)
    truth = draw.integers(0, 2, 4000)
    said = np.where(draw.random(4000) < 0.8, truth, 1 - truth)
    nothing = np.full((4000, 2), np.log(0.5))
    joint = join(nothing, 3.0 * np.eye(2)[said], truth)
    posterior = np.exp(log_softmax(joint.earlier * nothing + joint.own * 3.0 * np.eye(2)[said]))
    assert abs(posterior.max(axis=1).mean() - (said == truth).mean()) < 0.01


def test_calibrate_gives_calibrated_confidence_after_every_stage() -> None:
    draw = np.random.default_rng(7)
    truth = draw.integers(0, 3, 4000)

    def says(share: float, scale: float) -> NDArray[np.float64]:
        said = np.where(draw.random(4000) < share, truth, draw.integers(0, 3, 4000))
        return scale * np.eye(3)[said] + draw.normal(0, 0.1, (4000, 3))

    logits = {"ngrams": says(0.6, 5.0), "static": says(0.7, 0.2), "encoder": says(0.8, 30.0)}
    after = calibrate(logits, truth).stages(logits)
    figures = measured(after, truth)
    assert list(figures) == ["ngrams", "static", "encoder"]
    accuracy = [stage["accuracy"] for stage in figures.values()]
    assert accuracy == sorted(accuracy)
    assert max(stage["ece"] for stage in figures.values()) < 0.05
    assert figures_line("x", figures).startswith(
        f"x: ngrams {100 * accuracy[0]:.1f} % (calibration"
    )


def test_min_confidence_lets_scraps_be_general_and_keeps_what_is_right() -> None:
    p = np.array([[0.45, 0.35, 0.2]] * 10 + [[0.3, 0.4, 0.3]] * 10)
    truth = np.array([0] * 10 + [2] * 10)
    assert 0.4 < min_confidence(np.log(p), truth, general=2, wrong_costs=0) <= 0.45


def test_min_confidence_is_where_answers_are_more_often_right_than_wrong() -> None:
    p = np.repeat(np.array([[0.25, 0.25, 0.25, 0.25], [0.45, 0.2, 0.2, 0.15]]), 40, axis=0)
    y = np.concatenate([np.full(40, 3), np.zeros(40, dtype=np.int64)])
    assert 0.25 < min_confidence(np.log(p), y) <= 0.45


@pytest.mark.parametrize("costs", [0.0, 0.5, 1.0, 3.0])
def test_min_confidence_rises_with_what_a_wrong_answer_costs(costs: float) -> None:
    top = np.linspace(0.34, 0.99, 1000)
    p = np.column_stack([top, (1 - top) / 2, (1 - top) / 2])
    # Of the prompts with a confidence c, the share c is right.
    y = np.where(np.random.default_rng(1).random(1000) < top, 0, 1)
    wanted = costs / (1 + costs)
    assert abs(min_confidence(np.log(p), y, None, costs) - max(wanted, 0.1)) < 0.25
    assert min_confidence(np.log(p), y, None, costs) <= min_confidence(np.log(p), y, None, 4.0)


def test_fit_stages_without_folds_and_calibration_prompts_is_refused() -> None:
    rows = FitSet(["a", "b"], np.array([0, 1]), np.ones(2), np.arange(2), np.ones(2, bool))
    with pytest.raises(ValueError, match="at least two folds"):
        fit_stages(rows, ("x", "y"), None, None, FitOptions(folds=0))


def test_calibrate_beside_follows_the_weight_of_the_rows() -> None:
    draw = np.random.default_rng(2)

    def rows(count: int, share: float) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.int64]]:
        truth = draw.integers(0, 3, count)
        said = np.where(draw.random(count) < share, truth, (truth + 1) % 3)
        return {"ngrams": 4.0 * np.eye(3)[said], "static": 2.0 * np.eye(3)[said]}, truth

    sure, own = rows(300, 0.95), rows(3000, 0.6)

    def confidence(weight: float) -> float:
        found = calibrate_beside(*sure, *own, weight).stages(own[0])
        return float(np.exp(found["static"]).max(axis=1).mean())

    by_weight = [confidence(weight) for weight in (0.0, 0.2, 1.0, 100.0)]
    assert by_weight == sorted(by_weight, reverse=True)
    assert by_weight[0] == pytest.approx(0.95, abs=0.02)
    assert by_weight[2] == pytest.approx((0.95 + 0.6) / 2, abs=0.03)
    assert by_weight[-1] == pytest.approx(0.6, abs=0.02)


def test_rows_out_of_fold_are_judged_by_what_the_other_half_chose() -> None:
    draw = np.random.default_rng(4)
    count = 400
    options = FitOptions(folds=2, own_weight=1000.0)
    origin = np.arange(count)
    half = (origin // 2) % 2
    truth = draw.integers(0, 2, count)
    # The models are always right in one half, and guess in the other.
    said = np.where(half == 0, truth, draw.integers(0, 2, count))
    own = {"ngrams": 3.0 * np.eye(2)[said]}
    prompts = {"ngrams": 3.0 * np.eye(2)[truth[:20]]}
    every = np.ones(count, np.bool_)
    given = FitSet([""] * count, truth, np.ones(count), origin, every, every)
    chosen, held_out = calibrate_out_of_fold(prompts, truth[:20], own, given, options)
    sure = np.exp(held_out["ngrams"]).max(axis=1)
    assert sure[half == 0].mean() < 0.65 < 0.9 < sure[half == 1].mean()
    assert 0.65 < np.exp(chosen.stages(own)["ngrams"]).max(axis=1).mean() < 0.9
    nobody = FitSet([""] * count, truth, np.ones(count), origin, every)
    alone, _ = calibrate_out_of_fold(prompts, truth[:20], own, nobody, options)
    assert alone == calibrate(prompts, truth[:20])
