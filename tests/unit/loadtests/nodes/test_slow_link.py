"""The link that delays and loses packets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.nodes.slow_link import DelayLine

ARRIVALS = st.lists(st.tuples(st.floats(0, 1), st.sampled_from((0, 1))), max_size=40).map(
    lambda found: sorted(found)
)


@given(ARRIVALS, st.floats(0, 1))
def test_delay_line_without_loss_delivers_each_frame_once_in_order(
    arrivals: list[tuple[float, int]], delay_s: float
) -> None:
    line = DelayLine(delay_s, 0.0, lambda: 0.0)
    for number, (at_s, side) in enumerate(arrivals):
        line.put(at_s, side, bytes([number]))
    assert line.due(-1.0) == []
    sent = [(side, bytes([number])) for number, (_, side) in enumerate(arrivals)]
    assert line.due(3.0) == sent
    assert line.wait_s(3.0) is None


def test_delay_line_holds_a_frame_for_its_delay() -> None:
    line = DelayLine(0.05, 0.0, lambda: 0.0)
    line.put(1.0, 1, b"frame")
    assert line.due(1.049) == []
    assert line.wait_s(1.0) == pytest.approx(0.05)
    assert line.due(1.0501) == [(1, b"frame")]


def test_delay_line_loses_the_share_of_frames() -> None:
    line = DelayLine(0.0, 0.25, random.Random(7).random)
    for _ in range(4000):
        line.put(0.0, 0, b"")
    assert 900 < 4000 - len(line.due(0.0)) < 1100
