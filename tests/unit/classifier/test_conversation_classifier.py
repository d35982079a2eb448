"""Classification of conversations: which turns are read, and how they are weighted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service.classifier.classifier import Classifier
from service.classifier.conversation_classifier import classify_turns, content_words, user_turns
from service.classifier.hashed_ngrams import FeatureSpec, Featurizer

SPEC = FeatureSpec(char_orders=(), word_orders=(1,), bits=12, known_bits=16)


def keyword_classifier(words: dict[str, list[str]]) -> Classifier:
    """A classifier that knows only these words of each label."""
    featurizer = Featurizer(SPEC)
    weight = np.zeros((SPEC.buckets, len(words)), np.float32)
    known = np.zeros(1 << SPEC.known_bits, np.bool_)
    for column, listed in enumerate(words.values()):
        for word in listed:
            features = featurizer(word)
            weight[features.buckets, column] = 12
            known[features.marks] = True
    return Classifier(
        spec=SPEC,
        labels=tuple(words),
        idf=np.ones(SPEC.buckets),
        weight=weight,
        bias=np.zeros(len(words)),
        known=np.packbits(known),
        temperature=1.0,
        min_confidence=0.5,
        max_novelty=0.8,
    )


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return keyword_classifier({"general": ["poem"], "math": ["cows"], "code": ["python"]})


def test_classify_turn_without_content_words_inherits_the_category(classifier: Classifier) -> None:
    for follow_up in ("ok, go on", "thanks", "...", "", "why?", "Make it shorter please!"):
        assert classify_turns(classifier, ["cows cows", follow_up]).category == "math"


def test_classify_turn_with_many_content_words_is_independent(classifier: Classifier) -> None:
    assert classify_turns(classifier, ["cows cows", "python python"]).category == "code"
    assert classify_turns(classifier, ["cows", "python", "ok"]).category == "code"


def test_classify_single_turn_equals_the_plain_classifier(classifier: Classifier) -> None:
    assert classify_turns(classifier, ["cows"]) == classifier.classify("cows")
    assert classify_turns(classifier, ["ok"]) == classifier.classify("ok")
    assert classify_turns(classifier, []) == classifier.classify("")


def test_classify_unrecognised_turn_counts_as_general(classifier: Classifier) -> None:
    strange = "xqzw vbkj plmt gfds hhrr wwtt"
    assert classify_turns(classifier, ["cows cows", strange]).category == "general"


def test_classify_reads_only_the_last_turns(classifier: Classifier) -> None:
    turns = ["cows"] + ["ok"] * 50
    assert classify_turns(classifier, turns) == classify_turns(classifier, turns[-6:])


def test_classify_reads_long_earlier_turns_at_their_edges(classifier: Classifier) -> None:
    long = "cows " + "x" * 2_000_000 + " cows"
    assert classify_turns(classifier, [long, "ok"]).category in ("math", "general")


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), ("ok, go on", 0), ("What's that?", 0), ("add type hints", 2), ("x " * 999, 200)],
)
def test_content_words_counts(text: str, count: int) -> None:
    assert content_words(text) == count


@pytest.mark.parametrize(
    ("body", "turns"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, ["a"]),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": [{"type": "text", "text": "c"}]},
                ]
            },
            ["a", "c"],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": "x"}},
                            {"type": "text", "text": "b"},
                        ],
                    }
                ]
            },
            ["a\nb"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": "x"}]}]},
            [],
        ),
        ({"messages": [{"role": "system", "content": "s"}]}, ["s"]),
        ({"messages": []}, []),
        ({"prompt": "p"}, ["p"]),
        ({"prompt": ["p", "q"]}, ["p\nq"]),
        ({"prompt": [1, 2, 3]}, []),
        ({"prompt": [[1, 2], [3]]}, []),
        ({"input": "i"}, ["i"]),
        ({"input": ["i", "j"]}, ["i\nj"]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "i"}]}]}, ["i"]),
        (
            {"input": [{"type": "function_call_output", "output": "x"}], "instructions": "do"},
            ["do"],
        ),
        ({"messages": [None, 1, {"role": "user", "content": None}, {"role": []}]}, []),
        ({"messages": "x"}, []),
        ({}, []),
    ],
)
def test_user_turns_of_a_body(body: dict[str, Any], turns: list[str]) -> None:
    assert user_turns(body) == turns


def test_classify_turns_of_a_body_gives_the_category_of_its_user_turns(
    classifier: Classifier,
) -> None:
    body = {"messages": [{"role": "user", "content": "cows"}, {"role": "user", "content": "ok"}]}
    assert classify_turns(classifier, user_turns(body)).category == "math"
