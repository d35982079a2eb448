"""What a judge expert is asked, and how its verdicts become a score. Pure.

`service.broker.judge_prompts` has the questions and reads the verdicts, because the service judges
answers as well. Against a reference the judge is asked in both orders, else for a grade.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from router_models.outcome_recording.answer_check_kinds import JudgeCheck
from router_models.outcome_recording.answer_scoring import Score, ScoringError
from service.broker.answer_agreement import after_thinking
from service.broker.judge_prompts import MAX_TOKENS as MAX_TOKENS
from service.broker.judge_prompts import both_orders, preference, question, trimmed

_GRADE = re.compile(r"grade\W{0,6}(10|[1-9])\b(?!\s*[.,]\d)", re.IGNORECASE)
_GRADING = (
    "Grade the answer from 1 (useless) to 10 (as good as can be). Explain in at most three "
    "sentences, then end with the line `Grade: N`."
)


def questions(check: JudgeCheck, prompt: str, answer: str) -> list[list[dict[str, str]]]:
    """The conversations with which the judge is asked: two against a reference, else one."""
    answer = trimmed(answer)
    if check.reference is None:
        return [question(prompt, [("Answer", answer)], _GRADING, check.rubric)]
    return list(both_orders(prompt, answer, check.reference, check.rubric))


def score_verdicts(check: JudgeCheck, verdicts: Sequence[str]) -> Score:
    """The score by the judge's words, one text for each of `questions`.

    Raises:
        ScoringError: A text has no verdict.
    """
    if check.reference is None:
        grades = _GRADE.findall(after_thinking(verdicts[0]))
        if not grades:
            raise ScoringError("the judge gave no verdict that can be read")
        return Score((int(grades[-1]) - 1) / 9, f"graded {grades[-1]} of 10")
    value = preference(verdicts[0], verdicts[1])
    if value is None:
        raise ScoringError("the judge gave no verdict that can be read")
    return Score(value, {1.0: "better than the reference", 0.0: "worse"}.get(value, "a tie"))
