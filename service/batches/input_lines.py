"""Reads the input file of a batch: which of its lines can run, and what is wrong with the others.

The file is read line by line, so that its size does not matter. Only the places of the lines are
kept, and the lines are read again when they run.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import orjson

from service.batches.batch_records import InputError
from service.batches.batch_types import BatchLine
from service.errors import InvalidRequestError

CheckLine = Callable[[bytes], None]
"""Checks a line before it is parsed. Raises InvalidRequestError."""

_MOST_ERRORS = 20
_MAX_ID = 512
_FIELDS = "custom_id, method, url and body"


@dataclass(frozen=True, slots=True)
class LineFault:
    """A line that can't run.

    Attributes:
        number: Its number, from 0.
        custom_id: The client's name of it, or None where it has no usable one.
        code: The machine-readable reason.
        message: What was wrong, with the number from 1.
    """

    number: int
    custom_id: str | None
    code: str
    message: str


@dataclass(slots=True)
class InputIndex:
    """The lines of an input file.

    Attributes:
        numbers: The numbers of the lines that can run, rising.
        offsets: Where each of them starts in the file, in bytes.
        sizes: The length of each of them in bytes.
        faults: The lines that can't run.
        errors: What is wrong with the file as a whole; then no line runs.
    """

    numbers: array[int] = field(default_factory=lambda: array("L"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    faults: list[LineFault] = field(default_factory=list)
    errors: list[InputError] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of lines that are not empty."""
        return len(self.numbers) + len(self.faults)


class _LineError(Exception):
    """What is wrong with a line."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


def read_index(
    path: Path,
    endpoint: str,
    *,
    max_lines: int,
    max_line_bytes: int,
    check: CheckLine | None = None,
) -> InputIndex:
    """Read a file's lines, and check each. It blocks.

    Args:
        path: The file.
        endpoint: The endpoint that every line has to be for.
        max_lines: The most lines that a batch may have.
        max_line_bytes: The longest line.
        check: Checks each line before it is parsed.
    """
    index = InputIndex()
    seen: set[bytes] = set()
    empty = 0
    for number, offset, line in _lines(path, max_line_bytes):
        if line is not None and not line.strip():
            empty += 1
            # Millions of them would keep a core busy for minutes.
            if empty > max_lines:
                index.errors.append(
                    InputError(
                        "too_many_lines",
                        f"a batch may have {max_lines} empty lines at most",
                        number + 1,
                    )
                )
                return index
            continue
        if index.total == max_lines:
            index.errors.append(
                InputError(
                    "too_many_lines", f"a batch may have {max_lines} lines at most", number + 1
                )
            )
            return index
        try:
            if line is None:
                raise _LineError("line_too_long", f"it is longer than {max_line_bytes} bytes")
            if check is not None:
                check(line)
            custom_id, _ = _parse(line, endpoint)
            digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=12)
            if digest.digest() in seen:
                raise _LineError(
                    "duplicate_custom_id", "an earlier line has the same `custom_id`", custom_id
                )
            seen.add(digest.digest())
            index.numbers.append(number)
            index.offsets.append(offset)
            index.sizes.append(len(line))
        except InvalidRequestError as error:
            message = f"line {number + 1}: {error.message}"
            index.faults.append(LineFault(number, None, "invalid_line", message))
        except _LineError as error:
            message = f"line {number + 1}: {error}"
            index.faults.append(LineFault(number, error.custom_id, error.code, message))
    if not index.total:
        index.errors.append(InputError("empty_file", "the input file has no lines"))
    elif not index.numbers:
        index.errors += [
            InputError(fault.code, fault.message, fault.number + 1)
            for fault in index.faults[:_MOST_ERRORS]
        ]
    return index


def _lines(path: Path, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield the number, the offset and the content of each line; None for one that is too long."""
    with path.open("rb", buffering=1 << 18) as file:
        number = offset = 0
        while line := file.readline(max_bytes + 2):
            size, rest = len(line), line
            end = 2 if line.endswith(b"\r\n") else 1 if line.endswith(b"\n") else 0
            fits = size - end <= max_bytes
            while not rest.endswith(b"\n") and (rest := file.readline(1 << 18)):
                size += len(rest)
            yield number, offset, line if fits else None
            number, offset = number + 1, offset + size


def _parse(line: bytes, endpoint: str) -> tuple[str, dict[str, Any]]:
    """Check a line, and return its `custom_id` and its body.

    Raises:
        _LineError: The line can't run.
    """
    try:
        request = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise _LineError("invalid_json_line", "it is not valid JSON") from None
    if not isinstance(request, dict):
        raise _LineError("invalid_line", f"it must be an object with {_FIELDS}")
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _MAX_ID:
        raise _LineError(
            "invalid_custom_id", f"`custom_id` must be a text of 1 to {_MAX_ID} characters"
        )
    if request.get("method") != "POST":
        raise _LineError("invalid_method", "`method` must be POST", custom_id)
    if request.get("url") != endpoint:
        raise _LineError(
            "invalid_url", f"`url` must be the endpoint of the batch, {endpoint}", custom_id
        )
    body = request.get("body")
    if not isinstance(body, dict):
        raise _LineError("invalid_body", "`body` must be an object", custom_id)
    if body.get("stream"):
        raise _LineError("invalid_body", "`stream` is not possible in a batch", custom_id)
    return custom_id, body


class InputLines(Sequence[BatchLine]):
    """The lines of a file that can run. Each is read from the file when it is asked for.

    Args:
        path: The file.
        endpoint: The endpoint of the lines.
        index: The places of the lines.
    """

    def __init__(self, path: Path, endpoint: str, index: InputIndex) -> None:
        self._endpoint = endpoint
        self._index = index
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def __len__(self) -> int:
        return len(self._index.numbers)

    @overload
    def __getitem__(self, place: int) -> BatchLine: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[BatchLine]: ...

    def __getitem__(self, place: int | slice) -> BatchLine | Sequence[BatchLine]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        line = os.pread(self._handle, self._index.sizes[place], self._index.offsets[place])
        custom_id, body = _parse(line, self._endpoint)
        return BatchLine(self._index.numbers[place], custom_id, body)

    def numbered(self, number: int) -> BatchLine:
        """The line of a number.

        Raises:
            KeyError: There is no such line that can run.
        """
        place = bisect_left(self._index.numbers, number)
        if place == len(self) or self._index.numbers[place] != number:
            raise KeyError(number)
        return self[place]
