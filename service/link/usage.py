"""The usage in an engine's answer: where it stands in the bytes, and what it counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

# In JSON an unescaped quote ends a string: this can only be a key of an object.
_KEY = re.compile(rb'(?:,\s*)?"usage"\s*:\s*')
_COMMA = re.compile(rb"\s*,")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Usage:
    """One usage, in OpenAI's or Anthropic's words. None: it does not tell.

    `start`: where its key begins, with the comma before it; `value`: where its value does;
    `end`: behind it.
    """

    start: int
    value: int
    end: int
    told: bool
    prompt_tokens: int | None = None
    answer_tokens: int | None = None


def usages(data: bytes) -> Iterator[Usage]:
    """Every usage in a text of JSON; `told` is false for those that are null."""
    if b'"usage"' not in data:
        return
    text = ""
    for key in _KEY.finditer(data):
        if data.startswith(b"null", key.end()):
            yield Usage(key.start(), key.end(), key.end() + 4, told=False)
            continue
        # One byte a character, so that places are the same.
        text = text or data.decode("latin-1")
        try:
            value, end = _DECODER.raw_decode(text, key.end())
        except (json.JSONDecodeError, RecursionError):
            continue
        found = value if isinstance(value, dict) else {}
        yield Usage(
            key.start(),
            key.end(),
            end,
            isinstance(value, dict),
            _count(found, "prompt_tokens", "input_tokens"),
            _count(found, "completion_tokens", "output_tokens"),
        )


def last_usage(data: bytes) -> Usage | None:
    """The last one that tells anything."""
    return next((one for one in reversed(list(usages(data))) if one.told), None)


def without_usage(data: bytes) -> bytes:
    """The same JSON with no usage in it."""
    for one in reversed(list(usages(data))):
        end = one.end
        # The comma before it goes with it, or else the one behind it.
        if data[one.start : one.start + 1] != b"," and (comma := _COMMA.match(data, end)):
            end = comma.end()
        data = data[: one.start] + data[end:]
    return data


def _count(usage: dict[str, object], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int):
            return value
    return None
