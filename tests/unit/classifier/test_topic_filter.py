"""A conversation's topics decide as far as its last turn does not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.classifier.topic_filter import (
    MAX_TOPICS,
    Topics,
    carried_over,
    topics_of,
    with_topics,
)
from service.types import CategoryScores

LABELS = ("general", "math", "code", "law")
MATH: Topics = (("math", 1.0),)


def scores(*probabilities: float, category: str = "general") -> CategoryScores:
    return CategoryScores(LABELS, probabilities, category, max(probabilities), 0.1, "static")


UNSURE = scores(0.2, 0.3, 0.3, 0.2)


def filtered(last_turn: list[float], earlier: Topics, persistence: float = 0.5) -> CategoryScores:
    return with_topics(UNSURE, np.array(last_turn), earlier, persistence)


def test_with_topics_turn_without_content_is_about_what_the_conversation_was_about() -> None:
    found = filtered([1, 1, 1, 1], MATH)
    assert found.category == "math"
    assert found.confidence == pytest.approx(0.5 + 0.5 / 4)
    assert (found.novelty, found.stage) == (UNSURE.novelty, UNSURE.stage)


def test_with_topics_clear_turn_changes_the_subject() -> None:
    assert filtered([0.01, 0.01, 0.97, 0.01], MATH).category == "code"


def test_with_topics_doubtful_turn_stays_longer_the_greater_the_persistence() -> None:
    turn = [0.1, 0.2, 0.6, 0.1]
    of_math = [filtered(turn, MATH, p).probabilities[1] for p in (0, 0.2, 0.5, 0.9)]
    assert of_math[0] == UNSURE.probabilities[1]  # 0 leaves the scores alone
    assert all(less < more for less, more in pairwise(of_math[1:]))


@pytest.mark.parametrize("earlier", [(), (("gone", 1.0),), (("math", 0.0),)])
def test_topics_that_are_no_categories_leave_the_scores_alone(earlier: Topics) -> None:
    assert filtered([0.1, 0.2, 0.6, 0.1], earlier) is UNSURE
    assert carried_over(UNSURE, earlier) is UNSURE


def test_carried_over_repeats_the_conversation() -> None:
    found = carried_over(UNSURE, (("law", 0.6), ("math", 0.2)))
    assert found.probabilities == pytest.approx((0, 0.25, 0, 0.75))
    assert found.category == "law"
    assert found.confidence == pytest.approx(0.75)


def test_topics_of_keeps_the_most_probable() -> None:
    many = {str(i): p for i, p in enumerate([0.005, 0.4, 0.1, *[0.05] * 9])}
    found = topics_of(many)
    assert found[:2] == (("1", 0.4), ("2", 0.1))
    assert len(found) == MAX_TOPICS


@given(
    st.lists(st.floats(1e-6, 1), min_size=4, max_size=4),
    st.dictionaries(st.sampled_from((*LABELS, "gone")), st.floats(0, 1), max_size=5),
    st.floats(0, 0.99),
)
def test_with_topics_gives_probabilities(
    last_turn: list[float], earlier: dict[str, float], persistence: float
) -> None:
    found = filtered(last_turn, tuple(earlier.items()), persistence)
    assert sum(found.probabilities) == pytest.approx(1)
    assert all(0 <= p <= 1 for p in found.probabilities)
    if found is not UNSURE:
        assert found.confidence == max(found.probabilities)
        assert found.category == LABELS[int(np.argmax(found.probabilities))]
