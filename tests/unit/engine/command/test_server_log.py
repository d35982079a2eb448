from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.command.server_log import last_lines, log_path


@pytest.mark.parametrize("name", ["a", "org/name", "../../etc/passwd", "a:b~2", "x" * 128])
def test_log_path_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    assert log_path(tmp_path, name).parent == tmp_path
    log_path(tmp_path, name).write_text("")


def test_log_paths_of_different_experts_differ(tmp_path: Path) -> None:
    names = ["a/b", "a%2Fb", "a:b", "a.b", "A.b"]
    assert len({log_path(tmp_path, name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("one", ["one"]),
        ("one\ntwo\n\nthree\n", ["two", "three"]),
        ("10 %\r50 %\r100 %\n", ["100 %"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\x1b[31mred\x1b[0m\x07\n", [" [31mred [0m"]),
        ("y" * 10_000 + "\n", ["y" * 500]),
        ("the key is sesame and sesame-2\n", ["the key is *** and ***"]),
        ("abc\n", ["abc"]),
    ],
)
def test_last_lines_are_plain_bounded_and_without_secrets(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(text.encode())
    assert last_lines(path, 2, ["sesame", "sesame-2", "abc", ""]) == expected


def test_last_lines_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\xff\xfe ok\n")
    (line,) = last_lines(path, 5)
    assert line.endswith("ok")


def test_last_lines_go_on_in_earlier_files_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "log"
    assert last_lines(path, 5, earlier=True) == []
    for i, end in enumerate(("", ".1", ".2")):
        (tmp_path / f"log{end}").write_text(f"line {i}\n")
    assert last_lines(path, 5) == ["line 0"]
    assert last_lines(path, 2, earlier=True) == ["line 1", "line 0"]
    assert last_lines(path, 5, earlier=True) == ["line 2", "line 1", "line 0"]
