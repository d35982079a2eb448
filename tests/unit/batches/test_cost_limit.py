"""What is left of a batch's cost: lines never cost more together, and none waits for nothing."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batches.cost_limit import CostLimit

part = st.floats(0, 1)


@given(st.data(), st.floats(1e-3, 1e3), st.lists(part, min_size=1, max_size=40))
def test_lines_never_cost_more_than_allowed_and_none_waits_for_nothing(
    data: st.DataObject, most: float, expected: list[float]
) -> None:
    """Lines start, end, and are stored in any order, now and then by another gateway."""
    limit = CostLimit(most)
    waiting = {line: most * share / 4 for line, share in enumerate(expected)}
    under_way: dict[int, float] = {}
    real = others = 0.0
    while waiting or under_way:
        line = data.draw(st.sampled_from(sorted(waiting) + sorted(under_way)))
        if line in under_way:
            cost = data.draw(part) * under_way.pop(line)
            limit.begin_to_store(line, cost)
            counts = data.draw(st.booleans())
            real += cost if counts else 0.0
            if data.draw(st.booleans()):
                # The state may be looked at after it has the result and before that is known.
                limit.observe(real)
            limit.end_to_store(line, counts=counts)
            limit.give_back(line)
        else:
            may_cost = limit.reserve(line, waiting[line])
            if may_cost is not None:
                assert may_cost >= waiting[line] * (1 - 1e-9)
                under_way[line] = may_cost
            elif not limit.is_final:
                assert under_way, "a line waits for others"
                continue
            del waiting[line]
        if data.draw(st.integers(0, 9)) == 0 and limit.is_final:
            others = data.draw(part) * max(0.0, most - real) / 8
            real += others
            limit.observe(real)
        assert real <= most * (1 + 1e-9)
        assert limit.spent == pytest.approx(real)
    assert limit.under_way == 0.0
    assert limit.is_final


def test_without_a_bound_lines_cost_what_they_cost() -> None:
    limit = CostLimit(None)
    assert limit.reserve(0, 1e9) == math.inf
    assert limit.is_final


def test_late_results_of_the_gateway_before_count() -> None:
    limit = CostLimit(10.0, spent=2.0)
    limit.begin_to_store(7, 3.0)
    # It can't be told yet whose 3 units these are.
    limit.observe(5.0)
    assert limit.spent == 2.0
    limit.end_to_store(7, counts=False)
    limit.observe(5.0)
    assert limit.spent == 5.0
    assert limit.reserve(8, 6.0) is None
    assert limit.reserve(8, 1.0) == 4.0
