"""The file of outcomes: what survives, what is refused, and how rows are joined."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_models.outcome_reader import OutcomeError
from router_models.outcome_recording.outcome_file import (
    OutcomeFile,
    join_rows,
    read_rows,
    write_rows,
)


def row(identity: str, **more: Any) -> dict[str, Any]:
    return {"id": identity, "prompt": f"p{identity}", "outcomes": {}} | more


def test_outcome_file_appends_lines_and_joins_them_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with OutcomeFile(path) as file:
        file.append(row("1", errors={"a": {"code": "x"}}))
        file.append(row("2", outcomes={"a": {"score": 0}}))
        file.append(row("1", outcomes={"b": {"score": 1}}))
        file.append(row("1", outcomes={"a": {"score": 0.5}}))
        assert len(path.read_bytes().splitlines()) == 4
    assert read_rows(path) == [
        row("1", outcomes={"b": {"score": 1}, "a": {"score": 0.5}}),
        row("2", outcomes={"a": {"score": 0}}),
    ]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_outcome_file_removes_a_line_without_an_end(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "o.jsonl"
    whole = json.dumps(row("1", outcomes={"a": {"score": 1}})).encode() + b"\n"
    path.write_bytes(whole + whole[:cut])
    with OutcomeFile(path) as file:
        assert file.rows.keys() == {"1"}
        assert path.read_bytes() == whole
        file.append(row("2"))
    assert [one["id"] for one in read_rows(path)] == ["1", "2"]


def test_outcome_file_takes_a_last_line_without_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps(row("1")))
    with OutcomeFile(path) as file:
        file.append(row("2"))
    assert [one["id"] for one in read_rows(path)] == ["1", "2"]


def test_outcome_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with OutcomeFile(path) as first:
        first.append(row("1"))
        with pytest.raises(OutcomeError, match="another recording"), OutcomeFile(path):
            pass
        first.append(row("2"))
    with OutcomeFile(path) as second:
        assert second.rows.keys() == {"1", "2"}


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"id": 1, "prompt": "p", "outcomes": {}}'])
def test_outcome_file_of_something_else_is_refused_and_kept(tmp_path: Path, line: str) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text(json.dumps(row("1")) + "\n" + line + "\n")
    before = path.read_bytes()
    with pytest.raises(OutcomeError, match=r"o\.jsonl:2: is no row"), OutcomeFile(path):
        pass
    assert path.read_bytes() == before


def test_read_rows_compressed_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(OutcomeError, match="gunzip"):
        read_rows(path)


def test_write_rows_failing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    path.write_text("old")
    os.chmod(path, 0o640)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_rows(path, [row("1"), row("2", outcomes={"a": {"score": float("nan")}})])
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["o.jsonl"]
    write_rows(path, [row("1")])
    assert path.stat().st_mode & 0o777 == 0o640


ROWS = st.lists(
    st.builds(
        lambda i, name, score, failed: row(
            str(i),
            outcomes={} if failed else {name: {"score": score}},
            **({"errors": {name: {"code": "x"}}} if failed else {}),
        ),
        st.integers(0, 3),
        st.sampled_from("abc"),
        st.sampled_from([0, 0.5, 1]),
        st.booleans(),
    ),
    max_size=20,
)


@given(ROWS, st.integers(0, 20))
def test_join_rows_in_parts_is_joining_at_once(rows: list[dict[str, Any]], at: int) -> None:
    at_once = join_rows(rows)
    in_parts = join_rows([*join_rows(rows[:at]).values(), *rows[at:]])
    assert at_once == in_parts
    for joined in at_once.values():
        assert not joined["outcomes"].keys() & joined.get("errors", {}).keys()
    scored = {(one["id"], name) for one in rows for name in one["outcomes"]}
    assert scored == {(one["id"], name) for one in at_once.values() for name in one["outcomes"]}
