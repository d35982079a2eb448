"""How far votes shift a belief."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.feedback_prior import HALF_LIVES, SLICES, fields, recent, shift, slice_of, tally


def voted(count: int, score: float, voter: str = "key") -> dict[str, int]:
    return {name: count * n for name, n in fields("k", voter, score).items()}


def shifted(slices: list[dict[str, int]], believed: float, votes: int, max_shift: float) -> float:
    return shift(tally(slices).get("k", {}), believed, votes, max_shift)


def test_prior_without_votes_shifts_nothing() -> None:
    assert shifted([{}, fields("other", "key", 1.0)], 0.7, 20, 1.0) == 0


def test_prior_after_the_configured_number_of_votes_follows_them_by_four_fifths() -> None:
    assert shifted([voted(20, 0.0)], 1.0, 20, 1.0) == pytest.approx(-0.8)
    assert shifted([voted(20, 1.0)], 0.0, 20, 1.0) == pytest.approx(0.8)
    assert abs(shifted([voted(1, 0.0)], 1.0, 20, 1.0)) < 0.2


def test_prior_shift_is_bounded() -> None:
    assert shifted([voted(10_000, 0.0)], 1.0, 20, 0.3) == -0.3


def test_prior_votes_decay() -> None:
    fresh = shifted([voted(20, 0.0)], 1.0, 20, 1.0)
    old = shifted([{}] * SLICES + [voted(20, 0.0)], 1.0, 20, 1.0)
    assert old == pytest.approx(-10 / 15)
    assert fresh < old < 0


@given(
    many=st.integers(20, 10**6),
    others=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    believed=st.floats(0, 1),
)
def test_prior_votes_of_one_key_above_the_configured_number_change_nothing(
    many: int, others: list[float], believed: float
) -> None:
    counts = {
        name: n for i, s in enumerate(others) for name, n in voted(20, s, f"other{i}").items()
    }
    once = shifted([counts | voted(20, 0.0)], believed, 20, 1.0)
    assert shifted([counts | voted(many, 0.0)], believed, 20, 1.0) == pytest.approx(once)
    # And of so many keys it is one.
    without = shifted([counts], believed, 20, 1.0)
    assert abs(once - without) <= 1 / (len(others) + 1) + 1e-9


def test_recent_slices_cover_the_half_lives() -> None:
    assert slice_of(1000.0, 400.0) == 10
    found = recent(1000.0, 400.0)
    assert found[0] == 10
    assert len(found) == SLICES * HALF_LIVES
