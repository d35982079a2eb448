"""Which questions count as the same, and which never do."""

from __future__ import annotations

import re

import pytest

from service.api.likeness import likeness, said, same_words


def same(one: str, other: str, threshold: float = 0.8) -> bool:
    a, b = said(one), said(other)
    return same_words(a, b) and likeness(" ".join(a), " ".join(b)) >= threshold


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "what is the capital of france"),
        ("What is the capital of France?", "What is capital of France ?"),
        ("Explain photosynthesis to a child.", "Explain photosythesis to a child!"),
        (
            "Where can I recieve the parcel of yesterday?",
            "Where can I receive the parcel of yesterday?",
        ),
        ("Explain how photosynthesis works.", "Please explain how photosynthesis works"),
        ("Write a poem about the sea, please.", "Write a poem about the sea"),
    ],
)
def test_the_same_in_nearly_the_same_words(one: str, other: str) -> None:
    assert same(one, other)
    assert same(other, one)


LONG = "Our warehouse has many boxes and each of them weighs a lot. " * 20


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 2+2?", "What is 2+3?"),
        (LONG + "We have 12 boxes.", LONG + "We have 37 boxes."),
        (LONG + "Is it safe?", LONG + "Is it not safe?"),
        ("Convert -5 degrees", "Convert 5 degrees"),
        ("It costs 1.50", "It costs 15.0"),
        ("Who is Maria Smith?", "Who is Mario Smith?"),
        ("dog bites man today", "man bites dog today"),
        ("What is the capital of France?", "What is the capital of Finland?"),
        ("How do I enable it?", "How do I disable it?"),
        ("x < y", "x > y"),
        ("Which cat sits?", "Which cats sit?"),
        ("car insurance cost", "automobile insurance price"),
        ("", ""),
        ("?", "!"),
    ],
)
def test_never_the_same(one: str, other: str) -> None:
    assert not same(one, other)


def test_likeness_is_one_for_the_same_and_less_for_others() -> None:
    assert likeness("hello there", "hello there") == pytest.approx(1)
    assert likeness("hello there", "quantum physics") < 0.2
    assert likeness("", "") == 0


@pytest.mark.parametrize(
    "text",
    [
        "What is the sea?",
        "What is unpleased",
        "Tell a tale, please!",
        "x, thank you! Thanks.",
        "please",
        "thx!",
        "",
    ],
)
@pytest.mark.parametrize("more", ["", " please", ", thanks", " thank you very, thx!!", "thanks"])
def test_thanks_at_the_end_are_no_part_of_a_question(text: str, more: str) -> None:
    whole = (text + more).casefold()
    # As a search for them from every place on finds them, which takes long.
    bare = re.sub(r"[\s,.!]*(?:\b(?:please|thanks|thank you|thx)\b[\s,.!]*)+$", "", whole)
    assert said(whole) == said(bare + " .")


@pytest.mark.parametrize("text", [", " * 2000, "please " * 570 + "x", "thx" * 1300])
@pytest.mark.timeout(30)
def test_no_question_holds_the_gateway_up(text: str) -> None:
    for _ in range(200):
        said(text)
