"""Greedy answers compared: with each other, and with a reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli.doctor.greedy_answers import (
    GreedyAnswer,
    ReferenceScores,
    are_alike,
    difference,
    disagreement,
    judge_answers,
    tolerances,
)

TOKENS = 4
answers = st.builds(
    GreedyAnswer,
    st.tuples(*[st.integers(0, 5)] * TOKENS),
    st.tuples(*[st.floats(-9, 0)] * TOKENS),
)
WIDE = (1.0,) * TOKENS
A = GreedyAnswer((1, 2, 3, 4), (-0.5, -1.0, -1.5, -2.0))
B = GreedyAnswer((5, 6, 7, 8), (-0.4, -0.9, -1.1, -1.2))
SCORES = ReferenceScores(A.logprobs, A.logprobs, WIDE)


@given(answers, answers)
def test_difference_is_none_for_equal_answers_only(one: GreedyAnswer, two: GreedyAnswer) -> None:
    assert difference(one, one, WIDE, 0.0) is None
    assert (difference(one, two, WIDE, 0.0) is None) == (one == two)


@given(answers, st.integers(0, TOKENS - 1), st.integers(6, 9))
def test_difference_forgives_a_token_only_where_another_was_as_likely(
    one: GreedyAnswer, place: int, token: int
) -> None:
    tokens = (*one.tokens[:place], token, *[9] * (TOKENS - place - 1))
    other = replace(one, tokens=tokens)
    ties = tuple(0.0 if i == place else 1.0 for i in range(TOKENS))
    assert difference(one, other, ties, 0.01) is None
    assert f"token {place} is {token}" in str(difference(one, other, WIDE, 0.01))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (A, None),
        (replace(A, logprobs=(-0.5, -1.0, -1.5, -2.1)), "token 3 is off by 0.1"),
        (replace(A, logprobs=(-0.5, float("nan"), -1.5, -2.0)), "token 1 is off"),
        (GreedyAnswer((1, 2, 3), (-0.5, -1.0, -1.5)), "3 tokens instead of 4"),
        (replace(A, tokens=(1, 9, 3, 4)), "token 1 is 9 instead of 2"),
    ],
)
def test_difference_names_the_first_fault(changed: GreedyAnswer, why: str | None) -> None:
    found = difference(A, changed, WIDE, 0.05)
    assert found == why if why is None else why in str(found)


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        (SCORES, None),
        (replace(SCORES, logprobs=(-0.5, -1.4, -1.5, -2.0)), "token 1 is off by 0.4"),
        (replace(SCORES, best=(-0.5, -1.0, -0.2, -2.0)), "token 2 is not the most likely"),
        (replace(SCORES, best=(-0.5, -1.0, float("nan"), -2.0)), "token 2"),
    ],
)
def test_disagreement_names_the_first_fault(scores: ReferenceScores, why: str | None) -> None:
    found = disagreement(A, scores, 0.3)
    assert found == why if why is None else why in str(found)


OTHER = ReferenceScores(B.logprobs, B.logprobs, WIDE)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"one": [[A], [A]], "two": [[B], [B]]}, None),
        ({"one": [[A], [B]], "two": [[B], [B]]}, "model one, time 2, prompt 0"),
        ({"one": [[A], [A]], "two": [[B], [A]]}, "model two, time 2, prompt 0"),
        ({"one": [[B], [B]], "two": [[B], [B]]}, "model one"),
    ],
)
def test_judge_answers_finds_every_other_model(
    said: dict[str, list[list[GreedyAnswer]]], why: str | None, fresh: bool
) -> None:
    scores = {"one": [SCORES], "two": [OTHER]}
    expected = {"one": [A], "two": [B]} if fresh else {}
    found = judge_answers(said, scores, expected, "bfloat16")
    assert found == why if why is None else why in str(found)


def test_judge_answers_checks_fresh_engines_with_the_reference() -> None:
    wrong = {"one": [[B]]}
    found = judge_answers(wrong, {"one": [SCORES]}, {"one": [B]}, "float32")
    assert "against transformers" in str(found)


def test_tolerances_are_narrow_in_float32_only() -> None:
    assert tolerances("float32") < tolerances("bfloat16") == tolerances("float16")
    assert are_alike([A], [replace(A, logprobs=B.logprobs)])
    assert not are_alike([A], [B])
