"""Token usage: parsing it from replies and stream events, and estimating it from sizes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

# In JSON an unescaped quote ends a string: this can only be a key of an object.
_KEY = re.compile(rb'(?:,\s*)?"usage"\s*:\s*')
_DECODER = json.JSONDecoder()
AUDIO_TOKENS_PER_S = 50
"""Tokens of the prompt that a second of a recording counts as, where no tokens are told.

Whisper's encoder makes as many positions of it.
"""
# The usual length of a token in English text.
_BYTES_PER_TOKEN = 4
# Objects of an event that may hold its own usage. Elsewhere that key may be a user's, as in a
# tool's schema, metadata or a tool call's arguments.
_HOLDERS = ("response", "message")
# What a usage tells of the answer's tokens, in chat completions and in Responses.
_DETAILS = ("completion_tokens_details", "output_tokens_details")
# Most bytes of a reply that are parsed to find its own usage among several.
_MOST_READ = 16 * 1024**2
# What an endpoint tells beyond that is no count: it would be charged, and kept in a store.
_MOST_TOKENS = 2**31


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """A usage found in a text of JSON, in OpenAI's or Anthropic's words.

    Attributes:
        start: Offset of its key, or of the comma before it.
        value: Offset of its value.
        end: Offset behind its value.
        is_object: Whether the value is an object; false where it is null.
        prompt_tokens: Tokens of the prompt, if given; all tokens where nothing else is given, as by
            some servers that rank.
        answer_tokens: Tokens of the answer, if given.
        reasoning_tokens: Those of them that are thinking, if given.
    """

    start: int
    value: int
    end: int
    is_object: bool
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    reasoning_tokens: int | None = None


def estimate_tokens(byte_count: int) -> int:
    """Estimate the tokens of a text of this many bytes in UTF-8, where no tokenizer is at hand."""
    return byte_count // _BYTES_PER_TOKEN


def _usages(data: bytes) -> Iterator[TokenUsage]:
    """Every usage in a text of JSON."""
    if b'"usage"' not in data:
        return
    text = ""
    for key in _KEY.finditer(data):
        if data.startswith(b"null", key.end()):
            yield TokenUsage(key.start(), key.end(), key.end() + 4, is_object=False)
            continue
        # One character for each byte keeps the offsets.
        text = text or data.decode("latin-1")
        try:
            value, end = _DECODER.raw_decode(text, key.end())
        except (json.JSONDecodeError, RecursionError):
            continue
        found = value if isinstance(value, dict) else {}
        prompt = _count(found, "prompt_tokens", "input_tokens")
        answer = _count(found, "completion_tokens", "output_tokens")
        if prompt is None and answer is None:
            prompt = _count(found, "total_tokens")
            if prompt is None:
                prompt = _tokens_of_seconds(found)
        yield TokenUsage(
            key.start(),
            key.end(),
            end,
            isinstance(value, dict),
            prompt,
            answer,
            reasoning_tokens(found),
        )


def reply_usage(body: bytes) -> TokenUsage | None:
    """The usage of a whole reply: the one at the top level of its object.

    A key is at the top level if the rest after its value closes exactly one object. Only that rest
    is parsed, which is short: engines put the usage at the end.
    """
    left = _MOST_READ
    for usage in reversed([usage for usage in _usages(body) if usage.is_object]):
        left -= len(body) - usage.end
        if left < 0:
            return None
        try:
            orjson.loads(b'{"":0' + body[usage.end :])
        except orjson.JSONDecodeError:
            continue
        return usage
    return None


def usage_of(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """The usage in a stream's event, or in the reply that the event holds.

    It is the object itself: changes to it change the event.
    """
    for holder in (event, *(event.get(name) for name in _HOLDERS)):
        if isinstance(holder, Mapping) and isinstance(found := holder.get("usage"), dict):
            return found
    return None


def token_counts(usage: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Prompt and answer tokens of a usage of OpenAI or Anthropic; None where it lacks them."""
    return (
        _count(usage, "prompt_tokens", "input_tokens"),
        _count(usage, "completion_tokens", "output_tokens"),
    )


def reasoning_tokens(usage: Mapping[str, Any]) -> int | None:
    """Those of the answer's tokens that are thinking, in OpenAI's words; None if it lacks them."""
    for name in _DETAILS:
        if isinstance(details := usage.get(name), Mapping):
            return _count(details, "reasoning_tokens")
    return None


def _tokens_of_seconds(usage: Mapping[str, Any]) -> int | None:
    """The tokens of a usage that tells the seconds of a recording; None if it tells none."""
    seconds = usage.get("seconds")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool):
        return None
    tokens = seconds * AUDIO_TOKENS_PER_S
    return math.ceil(tokens) if 0 <= tokens <= _MOST_TOKENS else None


def _count(usage: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = usage.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS:
            return value
    return None
