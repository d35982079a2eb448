"""What is left of a batch's cost: lines never cost more together, and none waits for nothing."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from service.batches.cost_limit import CostLimit

part = st.floats(0, 1)


@given(st.data(), st.floats(1e-3, 1e3), st.lists(part, min_size=1, max_size=40))
def test_lines_never_cost_more_than_allowed_and_none_waits_for_nothing(
    data: st.DataObject, most: float, expected: list[float]
) -> None:
    """Lines start and end in any order."""
    limit = CostLimit(most)
    waiting = {line: most * share / 4 for line, share in enumerate(expected)}
    under_way: dict[int, float] = {}
    while waiting or under_way:
        line = data.draw(st.sampled_from(sorted(waiting) + sorted(under_way)))
        if line in under_way:
            limit.spent += data.draw(part) * under_way.pop(line)
            limit.give_back(line)
        else:
            least = most * data.draw(part) / 4
            may_cost = limit.reserve(line, waiting[line], least)
            if may_cost is not None:
                assert may_cost >= max(least, waiting[line]) * (1 - 1e-9)
                under_way[line] = may_cost
            elif not limit.is_final:
                assert under_way, "a line waits for others"
                continue
            del waiting[line]
        assert limit.spent + limit.under_way <= most * (1 + 1e-9)
    assert limit.under_way == 0.0
    assert limit.is_final


def test_without_a_bound_lines_cost_what_they_cost() -> None:
    limit = CostLimit(None)
    assert limit.reserve(0, 1e9) == math.inf
    assert limit.is_final
