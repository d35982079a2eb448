"""The lines of an input file, good and bad, whatever their sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.batches.input_lines import InputLines, read_index
from service.errors import InvalidRequestError

URL = "/v1/embeddings"
MOST = 200


def line(name: str, **body: object) -> bytes:
    given = {"custom_id": name, "method": "POST", "url": URL, "body": body}
    return json.dumps(given, ensure_ascii=False).encode()


parts = st.one_of(
    st.text(max_size=30).map(lambda text: ("good", line(f"é{text}"[:500], input=text))),
    st.sampled_from(
        [("blank", b""), ("blank", b"  "), ("bad", b"{"), ("bad", b"\xff"), ("bad", b"3")]
    ),
    st.integers(MOST, 3 * MOST).map(lambda size: ("bad", b"x" * (size + 1))),
)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [MOST - 1, MOST, MOST + 1, MOST + 2])
def test_read_index_takes_lines_of_the_greatest_size_and_no_more(
    tmp_path: Path, size: int, end: bytes
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line("a", input="x" * (size - len(line("a", input="")))) + end)
    index = read_index(path, URL, max_lines=9, max_line_bytes=MOST)
    assert [*index.numbers] == ([0] if size <= MOST else [])
    assert [fault.code for fault in index.faults] == ([] if size <= MOST else ["line_too_long"])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=st.lists(parts, max_size=12), ends=st.booleans())
def test_read_index_finds_each_line_at_its_place(
    parts: list[tuple[str, bytes]], ends: bool, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(text for _, text in parts) + (b"\n" if ends else b""))
    index = read_index(path, URL, max_lines=100, max_line_bytes=MOST)
    good, bad, seen = [], [], set()
    for number, (kind, text) in enumerate(parts):
        if kind == "blank":
            continue
        name = json.loads(text)["custom_id"] if kind == "good" and len(text) <= MOST else None
        if name is None or name in seen:
            bad.append(number)
        else:
            seen.add(name)
            good.append((number, json.loads(text)))
    assert [*index.numbers] == [number for number, _ in good]
    assert [fault.number for fault in index.faults] == bad
    assert bool(index.errors) == (not good)
    lines = InputLines(path, URL, index)
    try:
        assert [each.number for each in lines] == [number for number, _ in good]
        for number, content in good:
            found = lines.numbered(number)
            assert (found.custom_id, found.body) == (content["custom_id"], content["body"])
        for number in bad:
            with pytest.raises(KeyError):
                lines.numbered(number)
    finally:
        lines.close()


@pytest.mark.parametrize("count", [3, 4])
def test_read_index_more_lines_than_allowed_is_an_error_of_the_file(
    count: int, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n\n".join(line(f"c{i}") for i in range(count)))
    index = read_index(path, URL, max_lines=3, max_line_bytes=MOST)
    assert [error.code for error in index.errors] == (["too_many_lines"] if count > 3 else [])
    if count > 3:
        assert index.errors[0].line == 7


def test_read_index_many_empty_lines_are_an_error_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line("a") + b"\n" + b"\n" * 10**6)
    index = read_index(path, URL, max_lines=3, max_line_bytes=MOST)
    assert [(error.code, error.line) for error in index.errors] == [("too_many_lines", 5)]


def test_read_index_parses_no_line_that_the_check_refuses(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(line("a") + b"\n" + line("b", input="[[[") + b"\n" + line("c"))

    def check(text: bytes) -> None:
        if b"[[[" in text:
            raise InvalidRequestError("the body is nested too deep")

    index = read_index(path, URL, max_lines=9, max_line_bytes=MOST, check=check)
    assert [*index.numbers] == [0, 2]
    assert [fault.message for fault in index.faults] == ["line 2: the body is nested too deep"]
