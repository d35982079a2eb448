"""What a judge sees, and how its words become a score."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_models.outcome_recording.answer_check_kinds import JudgeCheck
from router_models.outcome_recording.answer_scoring import ScoringError
from router_models.outcome_recording.judge_prompts import questions, score_verdicts

PAIR = JudgeCheck(kind="judge", reference="the reference")
GRADED = JudgeCheck(kind="judge", rubric="is short")


def test_questions_show_both_orders_and_no_thoughts() -> None:
    first, second = (one[-1]["content"] for one in questions(PAIR, "Q", "<think>hm</think>mine"))
    assert first.index("mine") < first.index("the reference")
    assert second.index("the reference") < second.index("mine")
    assert "hm" not in first + second


@given(st.text(max_size=300))
def test_questions_answer_can_t_end_its_own_part(answer: str) -> None:
    (shown,) = questions(GRADED, "Q", answer)
    text = shown[-1]["content"]
    mark = text.split("<<", 1)[1].split("\n", 1)[0]
    assert text.count(f"{mark}>>") == 3
    assert mark not in answer


@pytest.mark.parametrize(
    ("texts", "score"),
    [
        (["Verdict: 1", "verdict: 2"], 1.0),
        (["Verdict: 2", "**Verdict:** 1"], 0.0),
        (["Verdict: Answer 1", "Verdict: Answer 1"], 0.5),
        (["Verdict: tie", "Verdict: tie"], 0.5),
        (["Verdict: 2 at first. Verdict: 1", "Verdict: 2"], 1.0),
        (["<think>Verdict: 2</think>Verdict: 1", "Verdict: 2"], 1.0),
    ],
)
def test_score_verdicts_pair_wins_only_in_both_orders(texts: list[str], score: float) -> None:
    assert score_verdicts(PAIR, texts).value == score


@pytest.mark.parametrize(
    ("text", "score"),
    [("Grade: 1", 0.0), ("Good.\n**Grade: 10**", 1.0), ("Grade: 5/10", 4 / 9), ("grade 7.", 2 / 3)],
)
def test_score_verdicts_grade_is_mapped_to_0_to_1(text: str, score: float) -> None:
    assert score_verdicts(GRADED, [text]).value == pytest.approx(score)


@pytest.mark.parametrize(
    ("check", "texts"),
    [
        (PAIR, ["", "Verdict: 1"]),
        (PAIR, ["Verdict: 3", "Verdict: 1"]),
        (PAIR, ["Answer 1 is better", "Verdict: 1"]),
        (GRADED, ["Grade: 0"]),
        (GRADED, ["Grade: 11"]),
        (GRADED, ["Grade: 7.5"]),
    ],
)
def test_score_verdicts_without_a_verdict_is_an_error(check: JudgeCheck, texts: list[str]) -> None:
    with pytest.raises(ScoringError, match="no verdict"):
        score_verdicts(check, texts)
