"""Prompts files: what a task may be, and errors that name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from router_models.outcome_reader import OutcomeError
from router_models.outcome_recording.task_reader import builtin_files, read_tasks

GOOD_CHECKS: list[dict[str, Any]] = [
    {"kind": "exact", "answer": "Paris"},
    {"kind": "exact", "answer": ["Paris", "paris, France"]},
    {"kind": "choice", "answer": "B", "choices": {"A": "one", "B": "two"}},
    {"kind": "number", "answer": 72, "relative_tolerance": 0.01},
    {"kind": "regex", "pattern": r"\bcat\b", "full": True},
    {"kind": "json_schema", "schema": {"type": "object"}, "expected": {"name": "Ann"}},
    {"kind": "contains_all", "texts": ["a", "b"], "none_of": ["c"]},
    {"kind": "unit_tests", "tests": ["x = add(1, 2)\nassert x == 3"]},
    {"kind": "judge", "reference": "a good one"},
    {"kind": "judge", "rubric": "friendly and short"},
]
BAD_LINES = [
    ("{", "is no JSON"),
    ("[]", "valid dictionary"),
    ({"prompt": "p"}, "check"),
    ({"check": {"kind": "number", "answer": 1}}, "exactly one of prompt, messages"),
    ({"prompt": "p", "check": {"kind": "nonsense"}}, "known: 'exact', 'choice'"),
    ({"prompt": "p", "check": {"kind": "exact", "answer": []}}, "check.exact.answer"),
    ({"prompt": "p", "check": {"kind": "exact", "answer": " "}}, "not empty"),
    ({"prompt": "p", "check": {"kind": "choice", "answer": "b"}}, "check.choice.answer"),
    (
        {"prompt": "p", "check": {"kind": "choice", "answer": "C", "choices": {"A": "x"}}},
        "choices has only A",
    ),
    ({"prompt": "p", "check": {"kind": "number", "answer": "many"}}, "check.number.answer"),
    ({"prompt": "p", "check": {"kind": "regex", "pattern": "("}}, "no regular expression"),
    ({"prompt": "p", "check": {"kind": "json_schema", "schema": {"type": 3}}}, "no JSON schema"),
    (
        {"prompt": "p", "check": {"kind": "json_schema", "schema": {"$ref": "https://a.b/c"}}},
        "outside of itself",
    ),
    ({"prompt": "p", "check": {"kind": "contains_all", "texts": []}}, "contains_all.texts"),
    ({"prompt": "p", "check": {"kind": "unit_tests", "tests": ["x ="]}}, "[0] is no Python"),
    ({"prompt": "p", "check": {"kind": "unit_tests", "tests": ["x = 1"]}}, "end with an `assert`"),
    ({"prompt": "p", "check": {"kind": "judge"}}, "a reference, a rubric, or both"),
    ({"prompt": "p", "more": 1, "check": {"kind": "judge", "rubric": "x"}}, "more: "),
    (
        {
            "messages": [{"role": "assistant", "content": "x"}],
            "check": {"kind": "judge", "rubric": "x"},
        },
        "must end with one of the role user",
    ),
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


@pytest.mark.parametrize("check", GOOD_CHECKS, ids=lambda check: check["kind"])
def test_read_tasks_reads_each_kind_of_check(tmp_path: Path, check: dict[str, Any]) -> None:
    line = {"prompt": "p", "category": "c", "check": check}
    (task,) = read_tasks([write(tmp_path / "a.jsonl", ["", line, "  "])])
    assert task.check.kind == check["kind"]
    assert task.category == "c"
    assert len(task.id) == 16
    assert task.conversation() == [{"role": "user", "content": "p"}]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_read_tasks_names_file_line_and_field(tmp_path: Path, line: Any, message: str) -> None:
    good = {"prompt": "p", "check": {"kind": "number", "answer": 1}}
    file = write(tmp_path / "a.jsonl", [good, line])
    with pytest.raises(OutcomeError) as error:
        read_tasks([file])
    assert f"{file}:2: " in str(error.value)
    assert message in str(error.value)


def test_read_tasks_repeated_id_names_the_second_line(tmp_path: Path) -> None:
    line = {"prompt": "p", "check": {"kind": "number", "answer": 1}}
    first, second = (write(tmp_path / name, [line]) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(OutcomeError, match=r"b\.jsonl:1: id: .* on an earlier line"):
        read_tasks([first, second])


def test_read_tasks_conversation_routes_by_its_last_message(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"},
    ]
    line = {"id": "x", "messages": talk, "check": {"kind": "number", "answer": 2}}
    (task,) = read_tasks([write(tmp_path / "a.jsonl", [line])])
    assert (task.id, task.text, task.conversation()) == ("x", "Two?", talk)


def test_read_tasks_many_errors_are_counted(tmp_path: Path) -> None:
    with pytest.raises(OutcomeError, match="and 5 more errors"):
        read_tasks([write(tmp_path / "a.jsonl", ["{"] * 25)])


def test_read_tasks_builtin_files_are_valid() -> None:
    files = builtin_files()
    if files:
        assert all(task.category for task in read_tasks(files))


def test_read_tasks_takes_the_guide_s_example(tmp_path: Path) -> None:
    guide = Path(__file__).parents[4] / "docs" / "guides" / "record-outcomes.md"
    example = guide.read_text().split("```json\n")[1].split("```")[0]
    tasks = read_tasks([write(tmp_path / "a.jsonl", [example])])
    assert [task.check.kind for task in tasks] == ["number", "choice", "unit_tests"]
    kinds = {line.split("`")[1] for line in guide.read_text().split("\n") if line.startswith("| `")}
    assert kinds >= {check["kind"] for check in GOOD_CHECKS}
