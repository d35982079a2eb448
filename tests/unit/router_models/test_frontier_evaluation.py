"""Standard errors and comparisons of a router with single experts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.frontier_evaluation import (
    comparison,
    report,
    singles,
    standard_error,
    with_errors,
)
from router_models.outcome_reader import Table
from router_models.recipe_replay import RecipeResults, play
from router_models.two_stage_fit import Predicted
from service.types import Recipe


def table(score: np.ndarray, cost: np.ndarray, prompts: list[str] | None = None) -> Table:
    """Outcomes (N, E) of experts `e0`, `e1` and so on."""
    count, experts = score.shape
    return Table(
        ids=tuple(map(str, range(count))),
        prompts=tuple(prompts or map(str, range(count))),
        categories=(None,) * count,
        experts=tuple(f"e{i}" for i in range(experts)),
        score=score,
        answer=np.full((count, experts), -1),
        has_answers=np.zeros(experts, bool),
        cost=cost,
        bystanders=np.zeros((count, 0)),
    )


def played(outcomes: Table) -> RecipeResults:
    return play([Recipe("single", (name,)) for name in outcomes.experts], outcomes)


def drawn(
    rng: np.random.Generator, prompts: int, recorded: int
) -> tuple[Table, RecipeResults, Predicted]:
    """A cheap and a dear expert on prompts each recorded so many times, and a noisy router."""
    hard = rng.random(prompts)
    right = np.stack([rng.random(prompts) > hard, rng.random(prompts) > 0.4 * hard], 1)
    seen = hard + rng.normal(0, 0.3, prompts)
    names = [f"p{i}" for i in range(prompts)]
    score = np.repeat(right.astype(float), recorded, axis=0)
    rows = len(score)
    outcomes = table(score, np.tile([1.0, 10.0], (rows, 1)), np.repeat(names, recorded).tolist())
    expected = np.repeat(np.stack([1 - seen, 1 - 0.4 * seen], 1), recorded, axis=0)
    predicted = Predicted(np.ones((rows, 1)), expected, outcomes.cost.copy())
    return outcomes, played(outcomes), predicted


@pytest.mark.parametrize("recorded", [1, 4])
def test_with_errors_reports_the_spread_over_repeated_samples(recorded: int) -> None:
    rng = np.random.default_rng(0)
    samples = [with_errors(*drawn(rng, 400 // recorded, recorded), [5.0])[0] for _ in range(300)]
    for value, error in (("gain", "gain_se"), ("score", "score_se")):
        real = float(np.std([sample[value] for sample in samples]))
        assert np.mean([sample[error] for sample in samples]) == pytest.approx(real, rel=0.15)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6))
def test_standard_error_of_repeated_rows_equals_that_of_one_each(
    seed: int, count: int, recorded: int
) -> None:
    values = np.random.default_rng(seed).random(count)
    once = standard_error(values, np.arange(count))
    assert once == pytest.approx(float(values.std()) / np.sqrt(count), abs=1e-12)
    again = standard_error(np.repeat(values, recorded), np.repeat(np.arange(count), recorded))
    assert again == pytest.approx(once, abs=1e-12)


def test_report_of_equal_experts_on_common_rows_finds_no_difference() -> None:
    easy = np.arange(200) < 100
    outcomes = table(
        np.stack([np.where(easy, 1.0, 0.0), np.where(easy, 1.0, np.nan)], 1), np.ones((200, 2))
    )
    predicted = Predicted(np.ones((200, 1)), np.tile([0.5, 0.6], (200, 1)), np.ones((200, 2)))
    found = report(outcomes, played(outcomes), predicted, ("c",), [1.0])
    assert found["compared"] == {"rows": 100, "of": 200, "left_out": []}
    assert found["best_single"]["score"] == found["at"][0]["score"] == found["oracle"]["score"] == 1
    row = with_errors(outcomes, played(outcomes), predicted, [1.0])[0]
    assert row["gain"] == pytest.approx(0)


def test_comparison_leaves_out_an_expert_with_few_rows() -> None:
    score = np.ones((100, 3))
    score[10:, 1] = np.nan
    score[:20, 2] = np.nan
    outcomes = table(score, np.ones((100, 3)))
    predicted = Predicted(np.ones((100, 1)), np.ones((100, 3)), np.ones((100, 3)))
    found = comparison(outcomes, played(outcomes), predicted)
    assert found.left_out == ("e1",)
    assert found.rows.tolist() == list(range(20, 100))
    alone = singles(found.table)
    assert alone.score.tolist() == [1.0, -np.inf, 1.0]


def test_comparison_without_any_outcome_raises() -> None:
    outcomes = table(np.full((3, 2), np.nan), np.ones((3, 2)))
    predicted = Predicted(np.ones((3, 1)), np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="no row has an outcome"):
        comparison(outcomes, played(outcomes), predicted)
