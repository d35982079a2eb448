"""Puts another model's name into replies and stream events."""

from __future__ import annotations

import re
from typing import Any

import orjson

# In JSON an unescaped quote ends a string: this can only be a key of an object.
_MODEL = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
# The objects of a reply or an event that name the model. In other objects, such as a tool's schema,
# metadata or a tool call's arguments, a `model` key belongs to the user.
_HOLDERS = ("response", "message")
# Most bytes that are parsed to find a reply's own name among several.
_MOST_READ = 4 * 1024**2


def rename_lines(lines: bytes, name: str) -> bytes:
    """Put a name into the events of a stream that name the model.

    Args:
        lines: Whole lines of the stream.
        name: The name.
    """
    if b'"model"' not in lines:
        return lines
    return b"".join(_rename_line(line, name) for line in lines.splitlines(keepends=True))


def _rename_line(line: bytes, name: str) -> bytes:
    if b'"model"' not in line or not line.startswith(b"data:"):
        return line
    try:
        event = orjson.loads(line[5:])
    except orjson.JSONDecodeError:
        return line
    if not isinstance(event, dict):
        return line
    rename(event, name)
    return b"data: " + orjson.dumps(event) + b"\n"


def rename(payload: dict[str, Any], name: str) -> None:
    """Put a name into a parsed reply or event, where it names the model."""
    for holder in (payload, *(payload.get(key) for key in _HOLDERS)):
        if isinstance(holder, dict) and "model" in holder:
            holder["model"] = name


def rename_reply(body: bytes, name: str) -> bytes:
    """Put a name into a whole reply, at the top level of its object.

    A key is at the top level if the text before it closes as one object. Only that text is parsed,
    which is short: engines name the model at the beginning.
    """
    left = _MOST_READ
    for key in _MODEL.finditer(body):
        left -= key.start()
        if left < 0:
            break
        try:
            orjson.loads(body[: key.start()] + b'"":0}')
        except orjson.JSONDecodeError:
            continue
        return body[: key.start(1)] + orjson.dumps(name) + body[key.end(1) :]
    else:
        return body
    try:
        payload = orjson.loads(body)
        payload["model"] = name
        return orjson.dumps(payload)
    except (orjson.JSONDecodeError, TypeError):
        return body
