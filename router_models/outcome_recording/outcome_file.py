"""The file of recorded outcomes: appended to line by line, then joined to one row per prompt.

While experts are asked, each outcome is a line of its own, written at once, so that a killed
recording loses only what was in flight. Rows of one id belong together; `join_rows` says how.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from router_models.outcome_reader import OutcomeError

Row = dict[str, Any]


def join_rows(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows by id, those of one id as one row.

    A later outcome of an expert replaces an earlier one, and replaces its error. An error does not
    replace an outcome. A row that was made with another check or other settings replaces all
    before it.

    Raises:
        OutcomeError: Two rows of one id have different prompts.
    """
    joined: dict[str, Row] = {}
    for row in rows:
        known = joined.get(row["id"])
        if known is not None and known["prompt"] != row["prompt"]:
            raise OutcomeError(f"two rows have the id {row['id']!r} and different prompts")
        if known is None or any(known.get(k) != row.get(k) for k in ("check", "asked")):
            joined[row["id"]] = {**row, "outcomes": dict(row.get("outcomes", {}))}
            continue
        errors = {**known.get("errors", {}), **row.get("errors", {})}
        outcomes = {**known["outcomes"], **row.get("outcomes", {})}
        known["outcomes"] = outcomes
        known.pop("errors", None)
        if errors := {name: error for name, error in errors.items() if name not in outcomes}:
            known["errors"] = errors
    return joined


def read_rows(path: Path) -> list[Row]:
    """All rows of a file. A last line without an end is left out: its writer was killed.

    Raises:
        OutcomeError: The file can't be read, or a line is no row; the message names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OutcomeError(f"{path}: {error.strerror}") from None
    if data[:2] == b"\x1f\x8b":
        raise OutcomeError(f"{path}: is compressed; unpack it with `gunzip`")
    *lines, last = data.split(b"\n")
    if last.strip():
        # A file of another hand may lack the last line's end.
        with contextlib.suppress(ValueError):
            json.loads(last)
            lines.append(last)
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("id"), str)
            or not isinstance(row.get("prompt"), str)
            or not isinstance(row.get("outcomes"), dict)
        ):
            raise OutcomeError(
                f"{path}:{number}: is no row of outcomes: needs id, prompt, outcomes"
            )
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows in place of a file, whole or not at all."""
    made, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(made, "wb") as file:
            for row in rows:
                file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class OutcomeFile:
    """A file of outcomes that this process alone writes to, as a context manager.

    Attributes:
        rows: What is in the file, joined, by id.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        self._file = -1

    def __enter__(self) -> OutcomeFile:
        """Open the file or make it, remove a last line without an end, and join its rows.

        Raises:
            OutcomeError: Another process writes to the file, or a line is no row.
        """
        self._lock()
        try:
            rows = read_rows(self.path)
            self.rows = join_rows(rows)
        except BaseException:
            os.close(self._file)
            raise
        size = os.fstat(self._file).st_size
        if size and (os.pread(self._file, 1, size - 1) != b"\n" or len(self.rows) < len(rows)):
            self._rewrite()
        return self

    def __exit__(self, *_: object) -> None:
        """Join the rows of the file."""
        try:
            self._rewrite()
        finally:
            os.close(self._file)

    def append(self, row: Row) -> None:
        """Write one line with outcomes or errors, and join it to the rows."""
        self.rows.update(join_rows([*filter(None, [self.rows.get(row["id"])]), row]))
        line = _line(row)
        while line:
            line = line[os.write(self._file, line) :]

    def drop(self, ids: Iterable[str]) -> None:
        """Remove the rows of these ids."""
        for identity in ids:
            self.rows.pop(identity, None)
        self._rewrite()

    def _lock(self) -> None:
        while True:
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                raise OutcomeError(f"{self.path}: {error.strerror}") from None
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another process may have put a new file in its place meanwhile.
                if os.fstat(self._file).st_ino == os.stat(self.path).st_ino:
                    return
            except BlockingIOError:
                os.close(self._file)
                raise OutcomeError(f"{self.path}: another recording writes to it") from None
            except FileNotFoundError:
                pass
            os.close(self._file)

    def _rewrite(self) -> None:
        before = self._file
        write_rows(self.path, self.rows.values())
        self._lock()
        os.close(before)


def merge(files: Mapping[Path, list[Row]]) -> tuple[dict[str, Row], int]:
    """The rows of several files joined, and how many outcomes a later file replaced.

    Raises:
        OutcomeError: Two rows of one id have different prompts, checks or settings.
    """
    joined: dict[str, Row] = {}
    replaced = 0
    for path, rows in files.items():
        try:
            own = join_rows(rows)
            for identity, row in own.items():
                known = joined.get(identity)
                if known is None:
                    continue
                for name in ("check", "asked"):
                    if known.get(name) != row.get(name):
                        raise OutcomeError(
                            f"the row {identity!r} has another `{name}` than in a file before it, "
                            f"so their scores can't be compared: {json.dumps(row.get(name))}, "
                            f"not {json.dumps(known.get(name))}"
                        )
                replaced += len(known["outcomes"].keys() & row["outcomes"].keys())
            joined = join_rows([*joined.values(), *own.values()])
        except OutcomeError as error:
            raise OutcomeError(f"{path}: {error}") from None
    return joined, replaced


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
