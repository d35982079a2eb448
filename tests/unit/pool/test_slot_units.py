"""The demand for units over time."""

from __future__ import annotations

import pytest

from service.pool.slot_units import UnitState


@pytest.mark.parametrize("per_s", [0.2, 1.0, 2.0, 25.0])
def test_demand_per_s_after_steady_requests_is_their_rate(per_s: float) -> None:
    known = UnitState()
    seconds = 600
    for i in range(int(seconds * per_s)):
        known.record_demand(1.0, i / per_s)
    # What halves every 30 s counts each request a little before or after its time.
    assert known.demand_per_s(seconds) == pytest.approx(per_s, rel=0.08)


def test_demand_per_s_after_the_last_request_halves_every_30_s() -> None:
    known = UnitState()
    known.record_demand(100.0, 0.0)
    assert known.demand_per_s(30.0) == pytest.approx(known.demand_per_s(0.0) / 2)
    assert known.demand_per_s(90.0) == pytest.approx(known.demand_per_s(0.0) / 8)
