"""The text of a chat conversation, and what is added to its last message. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def conversation_text(data: Mapping[str, Any]) -> str:
    """The text of a chat request: its one message, or all of them with their roles."""
    messages = [m for m in data.get("messages") or () if isinstance(m, dict)]
    texts = [(str(m.get("role", "")), _content(m.get("content"))) for m in messages]
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in texts)


def media_parts(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The images and sounds of a chat request, in order."""
    contents = [m.get("content") for m in data.get("messages") or () if isinstance(m, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if isinstance(part, dict) and part.get("type") != "text"]


def with_last_message(data: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    """The messages of a chat request, with a text added to the user's last one.

    Templates of some models refuse two messages of a user in a row, so it is none of its own unless
    the conversation ends with another role.
    """
    messages: list[dict[str, Any]] = list(data["messages"])
    last = messages[-1]
    if last.get("role") != "user":
        return [*messages, {"role": "user", "content": text}]
    content = last.get("content")
    if isinstance(content, list):
        added: Any = [*content, {"type": "text", "text": text}]
    else:
        added = f"{content}\n\n{text}" if content else text
    return [*messages[:-1], {**last, "content": added}]


def _content(content: object) -> str:
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
