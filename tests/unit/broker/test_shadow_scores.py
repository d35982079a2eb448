"""Scores without a known answer: majorities of final answers, and a judge's preferences."""

from __future__ import annotations

import pytest

from service.broker.answer_agreement import FinalAnswer
from service.broker.shadow_scores import scores_by_agreement, scores_by_preference

ONE, TWO, THREE = (FinalAnswer("number", value) for value in "123")


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        ([ONE, ONE], [1, 1]),
        ([ONE, TWO], None),
        ([ONE, TWO, TWO], [0, 1, 1]),
        ([ONE, TWO, THREE], None),
        ([ONE, ONE, TWO, TWO], None),
        ([ONE, None, ONE], None),
        ([ONE], None),
        ([], None),
    ],
)
def test_scores_by_agreement_need_a_majority_of_final_answers(
    finals: list[FinalAnswer | None], expected: list[int] | None
) -> None:
    names = "abcd"[: len(finals)]
    found = scores_by_agreement(dict(zip(names, finals, strict=True)))
    assert found == (None if expected is None else dict(zip(names, expected, strict=True)))


def test_scores_by_preference_give_the_served_the_mean_of_the_complements() -> None:
    assert scores_by_preference("s", {"a": 1.0, "b": 0.5}) == {"s": 0.25, "a": 1.0, "b": 0.5}
    assert scores_by_preference("s", {}) == {}
