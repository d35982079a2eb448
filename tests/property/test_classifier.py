"""The classifier returns a finite posterior that sums to 1 for any text."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from service.classifier.classifier import Classifier
from service.classifier.conversation_classifier import classify_turns, user_turns
from service.classifier.router_artifact import load_artifact
from service.types import CategoryScores

ARTIFACT = Path(__file__).parents[2] / "router_models" / "artifacts" / "demo@1"

anything = st.text(st.characters(), max_size=300)  # lone surrogates included
repeated = st.builds(lambda text, times: text * times, anything, st.integers(0, 400))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | anything,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "type", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@cache
def classifier() -> Classifier:
    return Classifier.from_artifact(load_artifact(ARTIFACT))


def check(scores: CategoryScores) -> None:
    assert len(scores.labels) == len(scores.probabilities)
    assert all(math.isfinite(p) and 0 <= p <= 1 for p in scores.probabilities)
    assert math.isclose(sum(scores.probabilities), 1, abs_tol=1e-6)
    assert scores.confidence == max(scores.probabilities)
    assert scores.category in (*scores.labels, "general")
    assert 0 <= scores.novelty <= 1


@settings(max_examples=150, deadline=None)
@given(anything | repeated)
def test_classify_any_text_gives_a_posterior(text: str) -> None:
    scores = classifier().classify(text)
    check(scores)
    assert scores == classifier().classify(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(anything, max_size=8))
def test_classify_any_conversation_gives_a_posterior(turns: list[str]) -> None:
    check(classify_turns(classifier(), turns))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "prompt", "input", "instructions"]), values))
def test_classify_any_body_is_accepted(body: dict[str, object]) -> None:
    turns = user_turns(body)
    assert all(isinstance(turn, str) for turn in turns)
    check(classify_turns(classifier(), turns))


def test_classify_ten_million_characters_takes_bounded_time() -> None:
    check(classifier().classify("a farmer has 12 cows " * 500_000))
