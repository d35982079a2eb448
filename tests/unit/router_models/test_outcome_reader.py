"""Reading outcomes and costs: what can be used is used, what can't is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models.outcome_reader import (
    NO_ANSWER,
    OutcomeError,
    costs_of,
    read_costs,
    read_outcomes,
    read_thinking,
    read_tokens,
)

COSTS = {"a": 1.0, "b": 5.0}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def row(identity: str, **more: Any) -> dict[str, Any]:
    return {"id": identity, "prompt": f"p {identity}", "outcomes": {"a": {"score": 1}}} | more


def test_read_outcomes_reads_a_plain_row(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl",
        [
            {
                "id": "1",
                "prompt": "p",
                "category": "math",
                "outcomes": {
                    "a": {"score": 1, "answer": "B"},
                    "b": {"score": 0.5, "answer": " b ", "cost": 7},
                },
            }
        ],
    )
    table, skipped = read_outcomes([file], COSTS)
    assert table.experts == ("a", "b")
    assert table.score.tolist() == [[1.0, 0.5]]
    assert table.cost.tolist() == [[1.0, 7.0]]
    assert table.answer[0, 0] == table.answer[0, 1] != NO_ANSWER
    assert table.categories == ("math",)
    assert skipped.lines() == []


def test_read_outcomes_detects_gzip_by_content(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(gzip.compress(json.dumps(row("1")).encode()))
    assert len(read_outcomes([file], COSTS)[0]) == 1


def test_read_outcomes_skips_and_names_invalid_rows(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl",
        [
            "{broken",
            "[]",
            "",
            {"id": "0", "outcomes": {"a": {"score": 1}}},
            row("1", surprise={"x": 1}),
            row("1"),
            row("2", outcomes={"a": {"score": 3}}),
            row("3", outcomes={"a": {"score": float("nan")}, "b": {"score": True}}),
            row("4", outcomes={"c": {"score": 1}}),
            row("5", category=7),
        ],
    )
    table, skipped = read_outcomes([file], COSTS)
    assert table.ids == ("1", "3", "5")
    assert table.categories == (None, None, None)
    assert np.isnan(table.score[1, 0])
    assert table.score[1, 1] == 1.0
    text = "\n".join(skipped.lines())
    for reason in ("not JSON", "without a prompt", "seen before", "score in 0..1", "no cost"):
        assert reason in text
    assert "x.jsonl:1" in text


def test_read_outcomes_without_an_answer_agrees_with_nothing(tmp_path: Path) -> None:
    outcomes = {"a": {"score": 0, "answer": None}, "b": {"score": 0}}
    table, _ = read_outcomes([write(tmp_path / "x", [row("1", outcomes=outcomes)])], COSTS)
    assert table.answer.tolist() == [[NO_ANSWER, NO_ANSWER]]
    assert table.has_answers.tolist() == [False, False]


def test_read_outcomes_truncated_archive_returns_what_was_read(tmp_path: Path) -> None:
    rows = "\n".join(json.dumps(row(str(i))) for i in range(20_000))
    file = tmp_path / "x.gz"
    file.write_bytes(gzip.compress(rows.encode())[:-20_000])
    table, skipped = read_outcomes([file], COSTS)
    assert 0 < len(table) < 20_000
    assert "damaged" in "\n".join(skipped.lines())


def test_read_outcomes_without_usable_rows_raises(tmp_path: Path) -> None:
    with pytest.raises(OutcomeError, match="nothing usable"):
        read_outcomes([write(tmp_path / "x", ["{"])], COSTS)
    with pytest.raises(OutcomeError, match="No such file"):
        read_outcomes([tmp_path / "missing"], COSTS)
    file = write(tmp_path / "y", [row("1")])
    with pytest.raises(OutcomeError, match="no cost is given for 'z'"):
        read_outcomes([file], COSTS, ["z"])
    with pytest.raises(OutcomeError, match="no row has an outcome of 'b'"):
        read_outcomes([file], COSTS, ["b"])


def test_read_outcomes_reads_costs(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.json", [COSTS])
    assert read_costs(plain) == COSTS
    nested = write(tmp_path / "nested.json", [{"one": {"a": 1}, "two": {"b": 2}}])
    assert read_costs(nested, [Path("/x/two.jsonl.gz")]) == {"b": 2.0}
    with pytest.raises(OutcomeError, match=r"sections \['one', 'two'\]"):
        read_costs(nested, [Path("three.jsonl")])
    for bad in ('{"a": -1}', '{"a": "1"}', "[]", "{", "{}", '{"a": true}'):
        with pytest.raises(OutcomeError, match=r"bad\.json"):
            read_costs(write(tmp_path / "bad.json", [bad]))


def test_read_outcomes_keeps_models_not_asked_for_as_bystanders(tmp_path: Path) -> None:
    outcomes = {"a": {"score": 1}, "b": {"score": 0.5}, "free": {"score": 0.25}}
    rows = [row(str(i), outcomes=outcomes) for i in range(3)]
    rows.append(row("3", outcomes={"a": {"score": 0}, "rare": {"score": 1}}))
    table, _ = read_outcomes([write(tmp_path / "x", rows)], COSTS, ["a"])
    assert table.experts == ("a",)
    assert table.bystanders[:3].tolist() == [[0.5, 0.25]] * 3
    assert np.isnan(table.bystanders[3]).all()
    assert len(table.take(np.array([1, 2])).bystanders) == 2


def test_read_outcomes_joins_lines_of_one_recording(tmp_path: Path) -> None:
    extended = {
        "score": 0,
        "cost": 3.0,
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "seconds": 0.5,
        "finish_reason": "length",
    }
    file = write(
        tmp_path / "x.jsonl",
        [
            row("1"),
            row("2"),
            row("1", outcomes={"b": extended}, errors={}),
            row("2", outcomes={}, errors={"b": {"code": "timeout", "message": "m"}}),
            row("2", prompt="another", outcomes={"b": {"score": 1}}),
        ],
    )
    table, skipped = read_outcomes([file], COSTS)
    assert table.ids == ("1", "2")
    assert table.score[0].tolist() == [1.0, 0.0]
    assert table.cost[0].tolist() == [1.0, 3.0]
    assert np.isnan(table.score[1, 1])
    assert sum(skipped.reasons.values()) == 2


def test_costs_of_without_a_file_are_the_recorded_means(tmp_path: Path) -> None:
    outcomes = [{"a": {"score": 1, "cost": 1.0}}, {"a": {"score": 1, "cost": 3.0}, "b": 1}]
    file = write(tmp_path / "x.jsonl", [row(str(i), outcomes=o) for i, o in enumerate(outcomes)])
    assert costs_of(None, [file]) == {"a": 2.0}
    given = tmp_path / "costs.json"
    given.write_text(json.dumps(COSTS))
    assert costs_of(given, [file]) == COSTS
    with pytest.raises(OutcomeError, match="no outcome has a cost"):
        costs_of(None, [write(tmp_path / "y.jsonl", [row("1")])])


def test_read_tokens_are_those_that_were_recorded(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        {"a": {"score": 1, "prompt_tokens": 30, "completion_tokens": 7}, "b": {"score": 0}},
        {"a": {"score": 1, "prompt_tokens": -1, "completion_tokens": True}},
    ]
    path.write_text(
        "\n".join(
            json.dumps({"id": i, "prompt": f"p{i}", "outcomes": one}) for i, one in enumerate(lines)
        )
    )
    table, _ = read_outcomes([path], {"a": 1, "b": 1})
    prompt, answer = read_tokens([path], table)
    assert np.array_equal(prompt, [[30, np.nan], [np.nan, np.nan]], equal_nan=True)
    assert np.array_equal(answer, [[7, np.nan], [np.nan, np.nan]], equal_nan=True)


def test_read_thinking_tells_what_was_cut_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    outcomes = [
        {"score": 1, "completion_tokens": 30, "reasoning_tokens": 20, "finish_reason": "stop"},
        {"score": 0, "completion_tokens": 30, "reasoning_tokens": 30, "finish_reason": "length"},
        {"score": 0, "completion_tokens": 30, "reasoning_tokens": 20, "finish_reason": "length"},
        {"score": 0, "completion_tokens": 30},
        {"score": 0, "reasoning_tokens": -5},
    ]
    path.write_text(
        "\n".join(
            json.dumps({"id": i, "prompt": f"p{i}", "outcomes": {"a": one}})
            for i, one in enumerate(outcomes)
        )
    )
    table, _ = read_outcomes([path], {"a": 1})
    tokens, cut = read_thinking([path], table)
    assert np.array_equal(tokens[:, 0], [20, 30, 20, np.nan, np.nan], equal_nan=True)
    assert cut[:, 0].tolist() == [False, True, False, False, False]
