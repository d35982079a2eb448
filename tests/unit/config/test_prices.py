"""The unit of cost."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.config.prices import PricesConfig


@pytest.mark.parametrize("unit", ["EUR", "€", "US cents", "<b>&", "compute"])
def test_prices_units_that_can_be_shown_are_kept(unit: str) -> None:
    assert PricesConfig(unit=unit).unit == unit


@pytest.mark.parametrize("unit", ["", " ", "EUR\n", "a\x1b[2Jb", "a\u202eb", "\ud800", "x" * 33])
def test_prices_units_that_would_change_a_terminal_are_refused(unit: str) -> None:
    with pytest.raises(ValidationError):
        PricesConfig(unit=unit)
