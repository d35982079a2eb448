"""How far votes shift a belief."""

from __future__ import annotations

import pytest

from service.broker.votes import HALF_LIVES, SLICES, recent, shift, slice_of


def voted(count: int, score: float) -> dict[str, int]:
    return {"k/n": count, "k/sum": round(1000 * score * count)}


def test_nobody_voted_nothing_shifts() -> None:
    assert shift([{}, {"other/n": 9}], "k", 0.7, 20, 1.0) == 0


def test_after_the_configured_votes_four_fifths_are_theirs() -> None:
    assert shift([voted(20, 0.0)], "k", 1.0, 20, 1.0) == pytest.approx(-0.8)
    assert shift([voted(20, 1.0)], "k", 0.0, 20, 1.0) == pytest.approx(0.8)
    assert abs(shift([voted(1, 0.0)], "k", 1.0, 20, 1.0)) < 0.2


def test_the_shift_is_bounded() -> None:
    assert shift([voted(10_000, 0.0)], "k", 1.0, 20, 0.3) == -0.3


def test_votes_fade() -> None:
    fresh = shift([voted(20, 0.0)], "k", 1.0, 20, 1.0)
    old = shift([{}] * SLICES + [voted(20, 0.0)], "k", 1.0, 20, 1.0)
    assert old == pytest.approx(-10 / 15)
    assert fresh < old < 0


def test_slices_are_of_time() -> None:
    assert slice_of(1000.0, 400.0) == 10
    found = recent(1000.0, 400.0)
    assert found[0] == 10
    assert len(found) == SLICES * HALF_LIVES
