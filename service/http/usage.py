"""The usage in an engine's answer: where it stands in the bytes, and what it counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

# In JSON an unescaped quote ends a string: this can only be a key of an object.
_KEY = re.compile(rb'(?:,\s*)?"usage"\s*:\s*')
_DECODER = json.JSONDecoder()
# Where an event or a reply tells its own usage: elsewhere that word is the user's, as in a tool's
# schema, metadata or a tool call's arguments.
_HOLDERS = ("response", "message")
# How much of a reply is read again to find which of many usages is its own, in bytes.
_MOST_READ = 16 * 1024**2
# What an endpoint tells beyond that is no count: it would be charged, and kept in a store.
_MOST_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class TokenUsage:
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


def _usages(data: bytes) -> Iterator[TokenUsage]:
    """Every usage in a text of JSON; `told` is false for those that are null."""
    if b'"usage"' not in data:
        return
    text = ""
    for key in _KEY.finditer(data):
        if data.startswith(b"null", key.end()):
            yield TokenUsage(key.start(), key.end(), key.end() + 4, told=False)
            continue
        # One byte a character, so that places are the same.
        text = text or data.decode("latin-1")
        try:
            value, end = _DECODER.raw_decode(text, key.end())
        except (json.JSONDecodeError, RecursionError):
            continue
        found = value if isinstance(value, dict) else {}
        yield TokenUsage(
            key.start(),
            key.end(),
            end,
            isinstance(value, dict),
            _count(found, "prompt_tokens", "input_tokens"),
            _count(found, "completion_tokens", "output_tokens"),
        )


def reply_usage(body: bytes) -> TokenUsage | None:
    """The usage of a whole reply: the one at the top of its object, if it tells anything.

    A key is at the top where what follows its value closes exactly one object. So only the rest
    of the reply is read, which is short: engines put the usage at the end.
    """
    left = _MOST_READ
    for one in reversed([one for one in _usages(body) if one.told]):
        left -= len(body) - one.end
        if left < 0:
            return None
        try:
            orjson.loads(b'{"":0' + body[one.end :])
        except orjson.JSONDecodeError:
            continue
        return one
    return None


def usage_of(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """The usage that a stream's event tells: its own, or that of the reply which it holds.

    The object itself, so that what is put into it is in the event.
    """
    for holder in (event, *(event.get(name) for name in _HOLDERS)):
        if isinstance(holder, Mapping) and isinstance(found := holder.get("usage"), dict):
            return found
    return None


def token_counts(usage: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Prompt and answer tokens of a usage, in OpenAI's or Anthropic's words. None: not told."""
    return (
        _count(usage, "prompt_tokens", "input_tokens"),
        _count(usage, "completion_tokens", "output_tokens"),
    )


def _count(usage: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS:
            return value
    return None
