"""The reference cost: which recipes' costs make up the level that presets compare with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.broker.reference_cost import best_shares


@pytest.mark.parametrize(
    ("quality", "cost", "shares"),
    [
        # Each is the best on one of two categories.
        ([[0.9, 0.2], [0.1, 0.8]], [1.0, 70.0], [0.5, 0.5]),
        # Dear, and best nowhere.
        ([[0.9, 0.8], [0.7, 0.6]], [1.0, 400.0], [1.0, 0.0]),
        # Of equally good recipes the cheapest.
        ([[0.9, 0.9]], [7.0, 3.0], [0.0, 1.0]),
        # Only candidates count, and categories without any do not.
        ([[-np.inf, 0.1], [-np.inf, -np.inf]], [1.0, 2.0], [0.0, 1.0]),
        ([[-np.inf, -np.inf]], [1.0, 2.0], [0.0, 0.0]),
    ],
)
def test_best_shares_are_those_of_categories(
    quality: list[list[float]], cost: list[float], shares: list[float]
) -> None:
    assert best_shares(np.array(quality), np.array(cost)).tolist() == shares


def test_best_shares_without_categories_are_zero() -> None:
    assert best_shares(np.zeros((0, 3)), np.ones(3)).tolist() == [0, 0, 0]


@given(
    arrays(np.float64, (4, 3), elements=st.floats(0, 1)),
    arrays(np.float64, 3, elements=st.floats(1e-3, 1e3)),
    st.floats(1e-6, 1e6),
)
def test_best_shares_do_not_depend_on_the_unit_of_cost(
    quality: np.ndarray, cost: np.ndarray, unit: float
) -> None:
    found = best_shares(quality, cost)
    assert found.sum() == pytest.approx(1)
    # Equal prices stay equal where the unit is a power of two.
    scaled = best_shares(quality, cost * 2.0 ** round(np.log2(unit)))
    assert found.tolist() == scaled.tolist()
