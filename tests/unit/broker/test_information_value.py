"""The value of knowing a prompt's category."""

from __future__ import annotations

import numpy as np
import pytest

from service.broker.information_value import value_of_category


def perfect(p: np.ndarray, quality: np.ndarray, cost: np.ndarray) -> float:
    """What perfect knowledge adds where each recipe has this cost."""
    utility = quality - cost
    return float(p @ utility.max(axis=1) - (p @ utility).max())


@pytest.mark.parametrize("seed", range(20))
def test_value_bounds_perfect_knowledge_for_every_cost_and_is_reached(seed: int) -> None:
    draw = np.random.default_rng(seed)
    categories, recipes = draw.integers(1, 9, 2) + 1
    quality = draw.random((categories, recipes))
    p = draw.dirichlet(np.full(categories, 0.5))
    value = value_of_category(7 * p, quality)
    assert 0 <= value <= 1
    for _ in range(200):
        cost = draw.normal(0, draw.choice((0.01, 0.3, 2)), recipes)
        assert perfect(p, quality, cost) <= value + 1e-12
    assert perfect(p, quality, p @ quality) == pytest.approx(value)


@pytest.mark.parametrize("seed", range(20))
def test_choice_that_ignores_a_classifier_below_a_value_loses_no_more_on_average(
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    quality, cost = draw.random((5, 4)), draw.random(4) / 4
    p = draw.dirichlet(np.full(5, 0.3))
    value = value_of_category(p, quality)
    # A classifier of any kind: what it says of each category, and what then is known.
    says = draw.dirichlet(np.full(6, 0.3), 5)
    joint = p[:, None] * says
    informed = sum(float((column @ (quality - cost)).max()) for column in joint.T)
    assert informed - float((p @ (quality - cost)).max()) <= value + 1e-12


def test_value_is_zero_where_no_knowledge_can_change_the_choice() -> None:
    same = np.array([[0.9, 0.4, 0.1]] * 3)
    p = np.array([0.4, 0.35, 0.25])
    assert value_of_category(p, same) == pytest.approx(0)
    # A kind of prompt that is harder for all alike.
    assert value_of_category(p, same - np.array([[0.0], [0.1], [0.05]])) == pytest.approx(0)
    assert value_of_category(p, np.ones((3, 1))) == 0
    assert value_of_category(np.zeros(3), np.eye(3)) == 0
    assert value_of_category(np.array([0.5, 0.5]), np.eye(2)) == pytest.approx(0.5)
