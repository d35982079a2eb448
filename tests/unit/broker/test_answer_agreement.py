"""Agreement of answers: equal in any phrasing, never equal by accident."""

from __future__ import annotations

import pytest

from loadtests.equal_and_different_text_pairs import (
    GROUPS,
    REFUSALS,
    SPELLINGS,
    STATED,
    different_answers,
)
from service.broker.answer_agreement import FinalAnswer, agreed, confidence, final_answer, majority

_PAIRS = 20_000


def agree(one: str, other: str) -> bool:
    return agreed([final_answer(one), final_answer(other)])


def test_agree_answers_that_differ_in_one_token_is_false() -> None:
    wrong = [pair for pair in different_answers(7, _PAIRS) if agree(*pair)]
    print(f"{len(wrong)} of {_PAIRS} pairs wrongly taken to agree")
    assert wrong == []


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
@pytest.mark.parametrize("style", STATED)
def test_agree_confusable_answers_in_any_form_is_false(group: tuple[str, ...], style: str) -> None:
    stated = [final_answer(STATED[style](item)) for item in group]
    known = [item for item in stated if item is not None]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("text", REFUSALS)
def test_final_answer_of_a_refusal_is_none(text: str) -> None:
    assert final_answer(text) is None
    assert final_answer(text, as_json=True) is None
    assert not agree(text, text)
    assert majority([final_answer(text), final_answer(text), final_answer("5")]) == 2


@pytest.mark.parametrize("style", STATED)
@pytest.mark.parametrize(
    "value", ["42", "-3", "B", "0.5", "x + 1", "Paris", "7 days", "12%", "yes"]
)
def test_final_answer_of_a_value_is_the_same_in_any_phrasing(value: str, style: str) -> None:
    assert agree(value, STATED[style](value))


@pytest.mark.parametrize(
    "way", [way for way in SPELLINGS if way not in ("with the unit", "with $")]
)
@pytest.mark.parametrize("number", ["5", "-7", "1234", "1000000", "0.25"])
def test_final_answer_of_a_number_is_the_same_in_any_notation(number: str, way: str) -> None:
    assert agree(number, SPELLINGS[way](number, ""))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\\boxed{2\\frac{1}{2}}", "\\boxed{\\frac{21}{2}}"),
        ("$2\\frac12$", "21/2"),
        ("$x^\\frac{1}{2}$", "x^1/2"),
        ("$\\frac{1}{2}3$", "1/23"),
        ("\\boxed{2\\,3}", "23"),
        ("$2\\;3$", "23"),
        ("1.000", "1"),
        ("10.000", "10"),
        ("for x in a:\n    f(x)\n    g()", "for x in a:\n    f(x)\ng()"),
        ("Yes, because it holds, unless x is 0.", "Yes, because it holds."),
        ("The answer is yes because it holds, unless x is 0.", "The answer is yes."),
        ("The answer is 5. Explanation: it is 7 if x < 0.", "The answer is 5."),
        ("The answer is 5.\n\nBecause of the tax it is 7 otherwise.", "5"),
        ("Since I doubt the answer is 5.", "5"),
        ("Because nobody believes that the answer is 5.", "5"),
    ],
)
def test_final_answer_spellings_that_would_be_confused_stay_different(one: str, other: str) -> None:
    assert not agree(one, other)


@pytest.mark.parametrize(
    "text",
    [
        "Could you please clarify the question?",
        "What do you mean?",
        "Hello! How can I help you today?",
        "Please provide more information.",
        "Please consult a doctor.",
        "Contact your administrator.",
        "Sure, go ahead.",
    ],
)
def test_final_answer_of_a_question_back_or_a_referral_is_none(text: str) -> None:
    assert final_answer(text) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-1/2", "$-\\frac{1}{2}$"),
        ("-1/2", "\\frac{-1}{2}"),
        ("3/4", "$\\frac34$"),
        ("12345", "$12\\,345$"),
        ("1,234", "$1,\\!234$"),
        ("5 m", "$5\\,\\text{m}$"),
        ("3.0", "3"),
        ("3.00", "3"),
        ("1,200.000", "1200"),
        ("Because 3 is odd, the answer is no.", "no"),
        ('{"a":1}', '{"a": 1.0}'),
        ('{"a": [1e2, true]}', '```json\n{"a": [100, true]}\n```'),
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}'),
        ("1/2", "0.5"),
        ("3/4", "\\boxed{\\frac{3}{4}}"),
        ("10%", "10 %"),
        ("5.", "5"),
        ("\u22125", "-5"),
        ("1,200", "1200.00"),
        ("(C)", "C"),
        ("[C]", "option C"),
        ("Yes.", "yes"),
        ("Answer:\n\n5", "5"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is B.\n\nExplanation: the others are too small.", "(B)"),
        ("<think>Perhaps 4? No.</think>The answer is 5.", "5"),
        ("The answer is 5. I hope this helps!", "The answer is 5."),
        ("$x = \\boxed{5}$", "Thus $x=\\boxed{5}$."),
        ("So the answer is J. Smith.", "J. Smith"),
    ],
)
def test_agree_same_answer_in_another_phrasing_is_true(one: str, other: str) -> None:
    assert agree(one, other)
    assert agree(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "The answer is 5.\nI hope this answer helps!",
            "The answer is 7.\nI hope this answer helps!",
        ),
        (
            "Answer: 12 apples.\n\nLet me know if you need another answer explained.",
            "Answer: 15 apples.\n\nLet me know if you need another answer explained.",
        ),
        ("The answer is 5.", "I don't think that the answer is 5."),
        ("The answer is 5.", "The answer isn't 5."),
        ("For x < 0, the answer is 5.", "For x > 0, the answer is 5."),
        ("The wrong answer is 5.", "The answer is 5."),
        ("\\boxed{5}", "-\\boxed{5}"),
        ("\\boxed{5}", "\\boxed{5} million"),
        ("\\boxed{5}", "It is less than \\boxed{5}."),
        ("\\boxed{5}", "2\\boxed{5}"),
        ("$x = \\boxed{5}$", "$y = \\boxed{5}$"),
        ("\\boxed{3} so \\boxed{\\frac12}", "\\boxed{3} so \\boxed{\\frac14}"),
        ("x is \\boxed{3} and y is \\boxed{4}", "x is \\boxed{2} and y is \\boxed{4}"),
        (
            "(a) The answer is 3.\n(b) The answer is 4.",
            "(a) The answer is 2.\n(b) The answer is 4.",
        ),
        ("The answer is 5.\nThat is in thousands.", "The answer is 5.\nThat is in millions."),
        ("The answer is 5.\nWait, that is wrong: 6.", "The answer is 5."),
        ("The answer is rain. This is because of snow.", "The answer is rain."),
        ("$5", "5"),
        ("2/4", "1/2"),
        ("3.10", "3.1"),
        ('{"a": 1}', '{"a": "1"}'),
        ('{"a": 1}', '{"a": true}'),
        ('{"a": 1, "a": 2}', '{"a": 2}'),
        ("```\nx = 1\n```", "```\nx  = 1\n```"),
        ("#### 5\nThat is one of them.", "#### 5"),
    ],
)
def test_agree_answers_with_different_context_is_false(one: str, other: str) -> None:
    assert not agree(one, other)
    assert not agree(other, one)


@pytest.mark.parametrize(
    "text", ["", " \n", "word " * 60, "<think>The answer is 5.", "I am happy."]
)
def test_final_answer_without_a_conclusion_is_none(text: str) -> None:
    assert final_answer(text) is None


def test_agree_json_answers_are_compared_as_json_only() -> None:
    assert final_answer("The answer is 5.", as_json=True) is None
    assert final_answer("5", as_json=True) == FinalAnswer("json", "5e0")
    assert final_answer("[NaN]", as_json=True) is None
    assert final_answer("[" * 100_000, as_json=True) is None


@pytest.mark.parametrize(
    "text",
    [
        one * (20_000 // len(one))
        for one in (
            *("**a", "\\boxed{", "answer is ", "so, ", "i hope this ", "1", "let me know "),
            *("{", "I am just ", "because ", "## ", "answer: the ", "it follows that "),
        )
    ],
)
@pytest.mark.timeout(20)
def test_agree_hostile_texts_take_bounded_time(text: str) -> None:
    for _ in range(10):
        final_answer(text)


def test_majority_is_the_answer_most_members_gave() -> None:
    finals = [final_answer(text) for text in ("4", "5", "The answer is 5.", "I don't know.")]
    assert majority(finals) == 2
    assert majority([None, None]) is None


def test_confidence_is_the_geometric_mean_of_token_probabilities() -> None:
    assert confidence([]) == 0
    assert confidence([0.0, 0.0]) == 1
    assert confidence([-1.0, -3.0]) == pytest.approx(0.1353, abs=1e-4)
