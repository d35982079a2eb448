"""Extracts a body's texts for screens, and puts redacted texts back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from service.errors import InvalidRequestError
from service.gateway.guard.screen_interface import Text

_TRUSTED = frozenset({"system", "developer"})
# Fields that an expert reads. The application's developer writes the fields of `_OPERATOR`, so
# their texts are trusted. The fields of `_PROMPT` hold the conversation.
_OPERATOR = (
    *("system", "instructions", "instruction", "tool_choice", "response_format"),
    *("structured_outputs", "output_format", "output_config", "text"),
)
# What tools are and take, often in the words of servers of others (Model Context Protocol).
_TOOLS = ("tools", "functions")
_PROMPT = (
    *("messages", "input", "prompt", "suffix", "documents", "prediction"),
    *("query", "text_1", "text_2", "hotwords"),
)
# Of these, the fields whose turns have roles.
_TURNS = frozenset({"messages", "input"})
# Strings under these keys belong to the protocol, and are no text. This does not hold inside of the
# objects under `_FREE`, such as a tool's arguments or a schema, because their keys are arbitrary.
_PROTOCOL = frozenset(
    {"type", "role", "id", "call_id", "tool_call_id", "tool_use_id", "status", "phase", "object"}
    | {"signature", "encrypted_content", "media_type", "format", "detail", "ttl"}
)
_FREE = frozenset({"input", "arguments", "output", "parameters", "input_schema", "schema"})
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.$/-]{0,64}")
# Values under these keys contain media, and no text.
_MEDIA = frozenset(
    {"image_url", "audio_url", "video_url", "input_audio", "input_image", "image", "audio"}
    | {"video", "input_video"}
)
# A schema may be nested as deep as a whole body.
_DEEP = 64

Change = Callable[[Text], str]


def texts_of(data: Mapping[str, Any], most: int) -> list[Text]:
    """Return every text of a prompt, in a fixed order.

    Args:
        data: The body.
        most: The most characters that all texts may have together.

    Raises:
        InvalidRequestError: The texts have more than `most` characters together.
    """
    found: list[Text] = []
    left = most

    def note(text: Text) -> str:
        nonlocal left
        left -= len(text.text)
        if left < 0:
            raise InvalidRequestError(
                f"the prompt has more than {most} characters; the guard checks at most {most}"
            )
        found.append(text)
        return text.text

    rewritten(data, note)
    return found


def check_readable(data: Mapping[str, Any]) -> None:
    """Refuse a prompt of token ids, which no screen can read.

    Raises:
        InvalidRequestError: The prompt is a list of token ids.
    """
    for name in ("prompt", "input"):
        given = data.get(name)
        for item in given if isinstance(given, list) else ():
            inner = item if isinstance(item, list) else (item,)
            if any(isinstance(value, int) for value in inner):
                raise InvalidRequestError(
                    f"`{name}` must be text: the guard can't check token ids",
                    param=name,
                )


def rewritten(data: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Return a copy of a body, with every text of its prompt changed.

    Args:
        data: The body.
        change: Returns the new text for each text, in the order of `texts_of`.

    Raises:
        InvalidRequestError: The prompt is nested too deep.
    """
    copy = dict(data)
    for names, trusted in ((_OPERATOR, True), (_TOOLS, False)):
        for name in names:
            if name in copy:
                copy[name] = _any(copy[name], trusted, change, _DEEP)
    for name in _PROMPT:
        if name in copy:
            copy[name] = _turns(copy[name], name in _TURNS, change, _DEEP)
    return copy


def _turns(value: Any, has_roles: bool, change: Change, deep: int) -> Any:
    """Change the texts of a conversation. Only a whole turn may have a role that is trusted."""
    if has_roles and deep and isinstance(value, list):
        return [_turns(item, has_roles, change, deep - 1) for item in value]
    role = value.get("role") if has_roles and isinstance(value, dict) else None
    return _any(value, isinstance(role, str) and role in _TRUSTED, change, deep)


def _any(value: Any, trusted: bool, change: Change, deep: int) -> Any:
    if isinstance(value, str):
        return change(Text(value, trusted)) if value else value
    if deep == 0:
        # An expert must not get a text that no screen has seen.
        raise InvalidRequestError("the prompt is nested too deep for the guard to check")
    if isinstance(value, list):
        return [_any(item, trusted, change, deep - 1) for item in value]
    if isinstance(value, dict):
        encoded = value.get("type") == "base64"
        copy = dict(value)
        for name, inner in value.items():
            if name in _MEDIA or (encoded and name == "data"):
                continue
            if name in _PROTOCOL and isinstance(inner, str):
                continue
            look = _all if name in _FREE and isinstance(inner, dict) else _any
            copy[name] = look(inner, trusted and name not in _TOOLS, change, deep - 1)
        return copy
    return value


def _all(value: Any, trusted: bool, change: Change, deep: int) -> Any:
    """Change the texts under every key. Unlike `_any`, it has no keys of the protocol.

    An expert reads the keys, too. Those that are no identifiers count as texts.
    """
    if deep and isinstance(value, dict):
        copy: dict[str, Any] = {}
        for name, item in value.items():
            key = name if _IDENTIFIER.fullmatch(name) else change(Text(name, trusted))
            while key in copy or (key != name and key in value):
                key += "'"  # two keys may have become one
            copy[key] = _all(item, trusted, change, deep - 1)
        return copy
    if deep and isinstance(value, list):
        return [_all(item, trusted, change, deep - 1) for item in value]
    return _any(value, trusted, change, deep)
