"""Means and intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router_models.outcome_recording.outcome_summary import interval, summarise


def test_summarise_counts_by_category_and_all() -> None:
    rows = [
        {
            "id": str(i),
            "prompt": "p",
            "category": "x" if i < 6 else "y",
            "outcomes": {
                "a": {
                    "score": i % 2,
                    "cost": float(i),
                    "completion_tokens": 10,
                    "finish_reason": "length" if i == 0 else "stop",
                }
            },
            "errors": {"b": {"code": "x", "message": "m"}},
        }
        for i in range(10)
    ]
    cells = {(cell.expert, cell.category): cell for cell in summarise(rows)}
    assert list(cells) == [
        ("a", "x"),
        ("a", "y"),
        ("a", "all"),
        ("b", "x"),
        ("b", "y"),
        ("b", "all"),
    ]
    whole = cells["a", "all"]
    assert (whole.prompts, whole.failed, whole.score, whole.cost) == (10, 0, 0.5, 4.5)
    assert (whole.completion_tokens, whole.prompt_tokens, whole.cut) == (10, None, 0.1)
    assert cells["a", "x"].cut == pytest.approx(1 / 6)
    assert (cells["b", "x"].prompts, cells["b", "x"].failed) == (0, 6)
    assert math.isnan(cells["b", "x"].score)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("count", [10, 50, 400])
def test_interval_covers_the_true_mean_in_about_95_percent(share: float, count: int) -> None:
    draws = np.random.default_rng(1).binomial(count, share, 4000) / count
    covered = np.mean([low <= share <= high for low, high in (interval(d, count) for d in draws)])
    assert 0.9 <= covered <= 1.0
    low, high = interval(share, count)
    assert 0 <= low < share < high <= 1


def test_interval_without_prompts_says_nothing() -> None:
    assert interval(math.nan, 0) == (0.0, 1.0)
