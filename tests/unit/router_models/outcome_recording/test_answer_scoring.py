"""Scores of right and wrong answers in many wordings."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from router_models.outcome_recording.answer_check_kinds import Check
from router_models.outcome_recording.answer_scoring import ScoringError, score_text, stated

CHECKS: TypeAdapter[Any] = TypeAdapter(Check)
LONG = "Let us look at this one step after another, since it is not obvious at all. " * 3
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z]"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TABLES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "exact",
        {"kind": "exact", "answer": ["Paris", "City of Light"]},
        [
            "Paris",
            "paris.",
            "**Paris**",
            '"Paris"',
            "The answer is Paris.",
            f"{LONG}\n\nFinal answer: Paris",
            "<think>London? No.</think>Paris",
            "city of  light",
            r"\boxed{\text{Paris}}",
        ],
        [
            "",
            "London",
            "Not Paris",
            "Paris or London",
            "I'm not sure, but Paris",
            "<think>Paris",
            "The answer is Paris. Wait, the answer is London.",
            "Parisian",
        ],
    ),
    (
        "exact case",
        {"kind": "exact", "answer": "NaCl", "ignore_case": False},
        ["NaCl", "The answer is NaCl."],
        ["nacl", "NACL"],
    ),
    (
        "choice",
        {"kind": "choice", "answer": "B", "choices": {"A": "red", "B": "blue", "C": "green"}},
        [
            "B",
            "(B)",
            "B.",
            "B) blue",
            "**B**",
            "blue",
            "Blue.",
            "The answer is B.",
            "The correct answer is (B) blue.",
            f"{LONG}\nAnswer: B",
            "The answer is B because the sky is blue.",
            f"B\n\n{LONG}",
            f"{LONG}\n\n(B)",
            "Option B",
        ],
        [
            "",
            "A",
            "A) blue",
            "red",
            "b and c",
            "(A) or (B)",
            "It depends",
            "The answer is A. Wait, the answer is B.",
            f"A\n{LONG}\nB",
            "ABBA",
            LONG,
        ],
    ),
    (
        "number",
        {"kind": "number", "answer": 1234.5},
        [
            "1234.5",
            "1,234.5",
            "1234.50",
            "$1,234.5",
            "1234.5 km",
            "The answer is 1234.5.",
            "#### 1234.5",
            r"\boxed{1234.5}",
            f"{LONG}\nSo the total is 1,234.5 dollars.",
            "x = 1234.5",
            "1000 + 234.5 = 1234.5",
            "2469/2",
            "<think>12</think> 1.2345e3",
        ],
        [
            "",
            "1234",
            "12345",
            "-1234.5",
            "1234.5 or 1235",
            "between 1 and 1234.5",
            "The answer is not 1234.5, it is 3.",
            "about twelve hundred",
            "#### 12",
            f"{LONG}\n1234.5\nNo: 17",
        ],
    ),
    (
        "number with tolerance",
        {"kind": "number", "answer": -10, "relative_tolerance": 0.01, "tolerance": 0.05},
        ["-10", "-10.1", "-9.9", "−10", "The answer is -10 °C"],
        ["10", "-10.2", "-9.8", "8-10"],
    ),
    (
        "number zero",
        {"kind": "number", "answer": 0},
        ["0", "0.0", "The answer is 0."],
        ["1", "0.001", "none", "1/0"],
    ),
    (
        "third",
        {"kind": "number", "answer": 0.3333, "tolerance": 0.001},
        ["1/3", r"\frac{1}{3}", "0.333", "The answer is 1/3."],
        ["1/4", "3", "1 3"],
    ),
    (
        "regex",
        {"kind": "regex", "pattern": r"\bgrep\b.*-i?r"},
        ["grep -r foo .", "```\ngrep -ir foo\n```"],
        ["", "egrep -r", "find", "<think>grep -r x</think>find"],
    ),
    (
        "regex full",
        {"kind": "regex", "pattern": r"[a-z]+", "full": True, "ignore_case": True},
        ["word", " WORD\n"],
        ["two words", "word!"],
    ),
    (
        "json",
        {"kind": "json_schema", "schema": SCHEMA, "expected": {"name": "Ann", "/age": 3}},
        [
            '{"name": "Ann", "age": 3}',
            '```json\n{"name": "Ann", "age": 3.0}\n```',
            'Here it is:\n```\n{"age": 3, "name": " Ann", "tags": ["x"]}\n```\nBye'.replace(
                '" Ann"', '"Ann"'
            ),
        ],
        [
            "",
            "{}",
            '{"name": "ann", "age": 3}',
            '{"name": "Ann", "age": "3"}',
            '{"name": "Ann", "age": true}',
            '{"name": "Ann", "age": 3, "more": 1}',
            '{"name": "Ann", "age": 3, "age": 3}',
            '{"name": "Ann", "age": NaN}',
            'Sure! {"name": "Ann", "age": 3}',
            "[" * 100_000,
            '```json\n{"name": "Ann", "age": 3}\n```\n```json\n{}\n```',
        ],
    ),
    (
        "contains",
        {"kind": "contains_all", "texts": ["New York", "1886"], "none_of": ["as an AI"]},
        ["In 1886, in  new york.", "NEW YORK 1886"],
        ["New York", "1886", "As an AI I say New York 1886", ""],
    ),
]


def cases(right: bool) -> list[Any]:
    return [
        pytest.param(check, text, id=f"{name}-{i}")
        for name, check, good, bad in TABLES
        for i, text in enumerate(good if right else bad)
    ]


@pytest.mark.parametrize(("check", "text"), cases(True))
def test_score_text_right_answer_is_1(check: dict[str, Any], text: str) -> None:
    score = score_text(CHECKS.validate_python(check), text)
    assert score.value == 1.0, score.reason


@pytest.mark.parametrize(("check", "text"), cases(False))
def test_score_text_wrong_answer_is_0(check: dict[str, Any], text: str) -> None:
    assert score_text(CHECKS.validate_python(check), text).value == 0.0


def test_score_text_json_counts_the_share_of_right_values() -> None:
    check = CHECKS.validate_python(
        {
            "kind": "json_schema",
            "schema": {"type": "object"},
            "expected": {"/a/0/b": 1, "c": [1, {"d": None}], "x~y": "z", "/no/9": 0},
        }
    )
    score = score_text(check, '{"a": [{"b": 1.0}], "c": [1, {"d": null}], "x~y": " z "}')
    assert score.value == 0.75


def test_score_text_contains_partial_counts_the_share() -> None:
    check = CHECKS.validate_python(
        {"kind": "contains_all", "texts": ["a1", "b2", "c3", "d4"], "partial": True}
    )
    assert score_text(check, "a1 and d4").value == 0.5


@pytest.mark.parametrize(
    "check",
    [
        {"kind": "regex", "pattern": "(a+)+$"},
        {
            "kind": "json_schema",
            "schema": {"properties": {"x": {"pattern": "(a+)+$"}}},
        },
    ],
)
def test_score_text_slow_pattern_is_bounded(check: dict[str, Any]) -> None:
    text = "a" * 5000 + "!"
    if check["kind"] == "json_schema":
        text = '{"x": "' + text + '"}'
    begun = time.monotonic()
    with pytest.raises(ScoringError, match="took more than 1 s"):
        score_text(CHECKS.validate_python(check), text)
    assert time.monotonic() - begun < 60


@given(st.floats(-1e9, 1e9, allow_nan=False).map(lambda x: round(x, 4)))
def test_score_text_number_is_right_in_every_spelling(number: float) -> None:
    check = CHECKS.validate_python({"kind": "number", "answer": number})
    for text in (f"{number:.4f}", f"{number:,.4f}", f"The answer is {number:.4f} m."):
        assert score_text(check, text).value == 1.0
    assert score_text(check, f"{number + 1:.4f}").value == 0.0


@given(st.text(max_size=300), st.sampled_from([check for _, check, _, _ in TABLES]))
def test_score_text_any_text_has_a_score(text: str, check: dict[str, Any]) -> None:
    assert 0.0 <= score_text(CHECKS.validate_python(check), text).value <= 1.0


def test_stated_is_what_recipes_compare() -> None:
    assert stated("The answer is (B).") == "B"
    assert stated(f"{LONG}\n#### 72") == "72"
    assert stated(LONG) is None


@pytest.mark.parametrize("keyword", ["multipleOf", "maximum", "exclusiveMinimum"])
def test_score_text_number_too_large_for_the_schema_raises_nothing(keyword: str) -> None:
    check = CHECKS.validate_python({"kind": "json_schema", "schema": {keyword: 0.01}})
    assert score_text(check, "1" + "0" * 400).value in (0.0, 1.0)
