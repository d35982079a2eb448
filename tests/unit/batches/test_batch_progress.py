"""Progress by model: shares of a plan, and the time to go."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.batches.batch_progress import (
    OTHER_MODELS,
    ModelCounts,
    PlannedShare,
    counted_as,
    progress_of,
    shares_of,
)
from service.batches.batch_types import LineChoice


def test_shares_have_the_lines_and_tokens_of_each_model_the_greatest_first() -> None:
    choices = [LineChoice(i, "ab"[i % 3 > 0], 0.5, 1.0, 10.0 + i) for i in range(6)]
    shares = shares_of(choices)
    assert [*shares] == ["b", "a"]
    assert shares == {"a": PlannedShare(2, 23.0), "b": PlannedShare(4, 52.0)}


def test_shares_of_many_names_are_bounded() -> None:
    names = [f"made-up-{i}" for i in range(500)] + ["x" * 100_000] * 600 + ["math"] * 3
    shares = shares_of(LineChoice(i, name, 0.0, 0.0, 1.0) for i, name in enumerate(names))
    assert len(shares) == 65
    assert max(map(len, shares)) <= 128
    assert shares["math"].lines == 3
    assert sum(share.lines for share in shares.values()) == len(names)
    assert sum(share.tokens for share in shares.values()) == len(names)
    assert shares[OTHER_MODELS].lines == len(names) - 3 - 63
    # Results count under the same names, so that these are as few.
    assert {counted_as(name, shares) for name in names} == shares.keys()
    # A model that came into a plan since then has its own.
    assert counted_as("new", {"math": PlannedShare(1, 1.0)}) == "new"


def test_time_to_go_is_that_of_the_tokens_that_are_left() -> None:
    shares = {"short": PlannedShare(10, 100.0), "long": PlannedShare(10, 1000.0)}
    counts = {"short": ModelCounts(5, 0, 10, 90, 0.5)}
    found = progress_of(shares, counts, 10.0)
    # Lines had twice the tokens that were expected of them: 100 in 10 s.
    assert found.models["short"].seconds_left == pytest.approx(10.0)
    assert found.models["long"].seconds_left == pytest.approx(200.0)
    assert found.seconds_left == pytest.approx(210.0)
    # Once a model's own lines are known, they count.
    counts["long"] = ModelCounts(1, 0, 0, 100, 0.5)
    found = progress_of(shares, counts, 20.0)
    assert found.models["long"].seconds_left == pytest.approx(9 * 100 / 200 * 20)


@pytest.mark.parametrize(
    ("counts", "elapsed_s", "seconds_left"),
    [
        ({}, 10.0, None),
        ({"a": ModelCounts(1, 1)}, None, None),
        # Without tokens the lines tell.
        ({"a": ModelCounts(1, 1)}, 10.0, 15.0),
        ({"a": ModelCounts(5, 0, 10)}, 10.0, 0.0),
    ],
)
def test_time_to_go_without_tokens_is_that_of_the_lines_that_are_left(
    counts: dict[str, ModelCounts], elapsed_s: float | None, seconds_left: float | None
) -> None:
    found = progress_of({"a": PlannedShare(5, 0.0)}, counts, elapsed_s)
    assert found.seconds_left == seconds_left
    assert found.models["a"].total == 5


counted = st.builds(ModelCounts, *[st.integers(0, 1000)] * 4, st.floats(0, 1e6, allow_nan=False))


# Fewer expected tokens than one say nothing of the others: the quotient would be infinite.
@example(
    {"a": PlannedShare(1, 5e-324), "b": PlannedShare(1, 0.0)}, {"a": ModelCounts(1, 0, 1)}, 1.0
)
@given(
    shares=st.dictionaries(
        st.sampled_from("abcd"), st.builds(PlannedShare, st.integers(1, 1000), st.floats(0, 1e6))
    ),
    counts=st.dictionaries(st.sampled_from("abcd"), counted),
    elapsed_s=st.none() | st.floats(-1, 1e6),
)
def test_progress_never_has_more_results_than_lines_nor_a_time_that_is_no_time(
    shares: dict[str, PlannedShare], counts: dict[str, ModelCounts], elapsed_s: float | None
) -> None:
    found = progress_of(shares, counts, elapsed_s)
    assert found.models.keys() == shares.keys() | counts.keys()
    for model in found.models.values():
        assert model.total >= model.counts.lines
        if model.seconds_left is not None:
            assert 0 <= model.seconds_left < math.inf
    assert found.to_json()["models"].keys() == found.models.keys()
