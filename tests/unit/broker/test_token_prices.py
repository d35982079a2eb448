"""The price of an answer, and its rounding to whole millionths."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.token_prices import Price, cost, micro


def test_prices_are_per_million_tokens() -> None:
    assert cost(Price(2.0, 10.0), 1_000_000, 500_000) == 7.0
    assert cost(Price(), 10**9, 10**9) == 0.0


@pytest.mark.parametrize(
    ("units", "counted"),
    [(0.0, 0), (1e-6, 1), (1.2e-6, 2), (0.1 + 0.2, 300_000), (1e-20, 0), (9e9, 9 * 10**15)],
)
def test_micro_units_are_rounded_up_despite_floating_point_noise(
    units: float, counted: int
) -> None:
    assert micro(units) == counted


@given(st.floats(0, 1000), st.floats(0, 1000), st.integers(0, 10**6), st.integers(0, 10**6))
def test_cost_is_never_rounded_below_the_exact_value(
    p: float, c: float, asked: int, answered: int
) -> None:
    units = cost(Price(p, c), asked, answered)
    assert units * 1e6 - 1e-3 <= micro(units) <= units * 1e6 + 1
