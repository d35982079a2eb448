"""The built-in tasks: enough of each category, with checks that tell right from wrong."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from router_models.general.categories import general_categories
from router_models.general.held_out_prompts import held_out_prompts, paraphrases
from router_models.outcome_recording.answer_check_kinds import JudgeCheck, UnitTestsCheck
from router_models.outcome_recording.answer_scoring import score_text
from router_models.outcome_recording.sandboxed_unit_tests import probe, score_code
from router_models.outcome_recording.task_reader import Task, builtin_files, read_tasks

ANSWERS: dict[str, dict[str, list[str]]] = json.loads(
    Path("tests/data/outcomes_builtin_answers.json").read_text(encoding="utf-8")
)
TASKS = read_tasks(builtin_files())
SCORED_BY_TEXT = [task for task in TASKS if not isinstance(task.check, JudgeCheck | UnitTestsCheck)]
WITH_UNIT_TESTS = [task for task in TASKS if isinstance(task.check, UnitTestsCheck)]
EVASIONS = ["", "I'm sorry, but I can't help with that.", "It depends on many things."]


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def right_and_wrong(task: Task) -> tuple[list[str], list[str]]:
    """Answers that must pass a check, and some that must not."""
    check: Any = task.check
    match check.kind:
        case "number":
            value = check.answer
            right = [f"{value:g}" if value < 1000 else str(value), f"So:\n\nAnswer: {value}"]
            return right, [f"Answer: {value * 2 + 7}"]
        case "choice":
            other = next(key for key in sorted(check.choices) if key != check.answer)
            return [check.answer, f"The answer is ({check.answer})."], [f"Answer: {other}"]
        case "exact":
            return list(check.answers), ["something else entirely"]
        case _:
            return ANSWERS[task.id]["right"], ANSWERS[task.id]["wrong"]


def test_builtin_tasks_are_14_of_each_category_and_seldom_need_a_judge() -> None:
    counts = Counter(task.category for task in TASKS)
    assert set(counts) == set(general_categories().names)
    assert min(counts.values()) >= 14
    judged = Counter(task.category for task in TASKS if isinstance(task.check, JudgeCheck))
    assert judged.total() <= len(TASKS) / 3
    assert all(judged[category] < counts[category] / 2 for category in counts)


def test_builtin_tasks_are_distinct_and_named_by_their_category() -> None:
    cases = [json.dumps(task.conversation()) for task in TASKS]
    assert len(set(cases)) == len(cases)
    assert all(re.fullmatch(rf"{task.category}-\d\d", task.id) for task in TASKS)


def test_builtin_choices_have_no_favourite_letter() -> None:
    letters = Counter(task.check.answer for task in TASKS if task.check.kind == "choice")
    assert max(letters.values()) <= 0.4 * letters.total()


def test_builtin_choices_stand_in_the_prompt() -> None:
    for task in TASKS:
        if task.check.kind == "choice":
            for letter, text in task.check.choices.items():
                assert f"\n{letter}) {text}\n" in task.text, task.id


def test_builtin_tasks_are_not_among_the_held_out_prompts() -> None:
    held_out = {normal(item.prompt) for item in [*held_out_prompts(), *paraphrases()]}
    assert not [task.id for task in TASKS if normal(task.text) in held_out]


@pytest.mark.parametrize("task", SCORED_BY_TEXT, ids=lambda task: task.id)
def test_builtin_check_passes_right_answers_and_no_others(task: Task) -> None:
    right, wrong = right_and_wrong(task)
    assert right
    assert wrong
    for answer in right:
        assert score_text(task.check, answer).value == 1.0, answer  # type: ignore[arg-type]
    for answer in [*wrong, *EVASIONS]:
        if task.category != "small-talk" or answer in wrong:  # there, a short evasion is a reply
            assert score_text(task.check, answer).value < 1.0, answer  # type: ignore[arg-type]


async def test_builtin_unit_tests_pass_right_programs_and_no_others() -> None:
    if reason := await probe():
        pytest.skip(f"no sandbox here: {reason}")
    at_once = asyncio.Semaphore(4)

    async def score(task: Task, code: str) -> float:
        assert isinstance(task.check, UnitTestsCheck)
        async with at_once:
            return (await score_code(task.check, f"```python\n{code}\n```")).value

    for kind, value in (("right", 1.0), ("wrong", 0.0)):
        cases = [(task, code) for task in WITH_UNIT_TESTS for code in ANSWERS[task.id][kind]]
        scores = await asyncio.gather(*(score(task, code) for task, code in cases))
        assert {task.id for (task, _), got in zip(cases, scores, strict=True) if got != value} == (
            set()
        )
        assert len(cases) >= len(WITH_UNIT_TESTS) > 0
