"""The training texts of the demo experts and how they are packed, without torch."""

from __future__ import annotations

import ast
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from router_models.experts import training_texts
from router_models.experts.conversation_packing import (
    Conversation,
    make_row,
    pack,
    shared_beginning,
)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_math_rows_drop_calculator_marks() -> None:
    worked = "48/2 = <<48/2=24>>24 clips, $<<0.2*50=10>>10.\n#### 10\n"
    assert training_texts.strip_calculator_marks(worked) == "48/2 = 24 clips, $10.\n#### 10"


def test_math_rows_are_in_one_split_only(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "gsm8k_train.jsonl.gz",
        [{"question": f"q{index}", "answer": f"#### {index}"} for index in range(400)],
    )
    split = training_texts.load("math", tmp_path, seed=0)
    assert (len(split.train), len(split.held_out)) == (100, 300)
    assert not {row.group for row in split.train} & {row.group for row in split.held_out}
    assert training_texts.load("math", tmp_path, seed=0) == split


def test_utterances_in_two_splits_are_excluded(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "clinc150.jsonl.gz",
        [
            {"text": "hi there", "intent": "greeting", "split": "train"},
            {"text": "book a flight", "intent": "book_flight", "split": "train"},
            {"text": "hi there", "intent": "greeting", "split": "test"},
        ],
    )
    split = training_texts.load("intents", tmp_path, seed=0)
    assert [row.answer for row in split.train] == ["book_flight"]
    assert [row.prompt for row in split.held_out] == ["hi there"]


def test_as_typed_changes_case_and_punctuation_only() -> None:
    draw = random.Random(0)
    forms = {training_texts.as_typed("what is up", draw) for _ in range(200)}
    assert forms == {"what is up", "What is up", "What is up?"}


def function(text: str) -> training_texts.Example | None:
    node = ast.parse(text).body[0]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    return training_texts.function_example(node, "module")


def test_code_function_becomes_question_and_answer() -> None:
    example = function(
        '@cached\ndef twice(x: int) -> int:\n    """Double."""\n    return 2 * x  # c'
    )
    assert example is not None
    assert example.prompt == (
        "Write this Python function:\n\n```python\n"
        'def twice(x: int) -> int:\n    """Double."""\n```'
    )
    assert example.answer == "```python\ndef twice(x: int) -> int:\n    return 2 * x\n```"


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return 1",
        'def f():\n    """Only this."""',
        'def f():\n    """Abstract."""\n    raise NotImplementedError',
        f'def f():\n    """{"long " * 200}"""\n    return 1',
    ],
)
def test_code_functions_without_content_are_skipped(text: str) -> None:
    assert function(text) is None


def test_code_modules_are_held_out_as_a_whole(tmp_path: Path) -> None:
    names = [f"module{index}" for index in range(60)]
    for name in names:
        (tmp_path / f"{name}.py").write_text('def f(x):\n    """Doc."""\n    return x\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('def f(x):\n    """Doc."""\n    return x\n')
    found = {row.group for row in training_texts.documented_functions(tmp_path)}
    assert found == set(names)
    assert 0 < sum(map(training_texts.is_held_out_module, names)) < 20


def conversation(*own: int, answer: tuple[int, ...]) -> Conversation:
    return Conversation((1, 2, 3, *own), answer, 1, "g")


def test_packed_row_attends_within_each_conversation_only() -> None:
    first = conversation(10, 11, answer=(20, 21, 9))
    second = conversation(12, answer=(22, 9))
    beginning = shared_beginning([first, second])
    assert beginning == (1, 2, 3)
    row = make_row([first, second], beginning)
    assert row.token_ids.tolist() == [1, 2, 3, 10, 11, 20, 21, 12, 22]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4]
    assert row.targets.tolist() == [20, 21, 9, 22, 9]
    assert row.token_ids[row.predictors].tolist() == [11, 20, 21, 12, 22]
    assert row.owners.tolist() == [0, 0, 0, 1, 1]
    allowed = row.may_attend()
    assert np.flatnonzero(allowed[6]).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(allowed[8]).tolist() == [0, 1, 2, 7, 8]
    assert not np.triu(allowed, 1).any()


def test_packed_rows_are_filled_in_order_and_lose_nothing() -> None:
    conversations = [conversation(10 + index, answer=(20, 9)) for index in range(10)]
    rows = list(pack(conversations, (1, 2, 3), row_tokens=12))
    assert [len(row.conversations) for row in rows] == [3, 3, 3, 1]
    assert [c for row in rows for c in row.conversations] == conversations
    assert all(len(row.token_ids) <= 12 for row in rows)


def test_shared_beginning_leaves_a_token_to_each_prompt() -> None:
    same = [Conversation((1, 2), (9,), 0, "a"), Conversation((1, 2), (8,), 0, "b")]
    assert shared_beginning(same) == (1,)
    assert shared_beginning([]) == ()


def test_make_row_with_another_beginning_raises() -> None:
    with pytest.raises(ValueError, match="does not begin"):
        make_row([conversation(1, answer=(9,))], (7,))
