"""Reads where a conversation stands: its beginning, its history, and its open tool calls. Pure.

It knows the forms of OpenAI's chat completions and Responses and of Anthropic's messages. Malformed
parts are skipped, because engines refuse them. System prompts are skipped as well: agents put dates
and lists of files there, which change with every request.

Digests see both ends and the length of each text, so that their time does not grow with long texts.
They do not depend on the process, so that gateways can share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Item = Mapping[str, Any]

_EDGE = 256
_MAX_PARTS = 64
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, slots=True)
class TurnState:
    """Where a conversation stands.

    Attributes:
        beginning: Digest of its first message; None without messages.
        history: Digest of the messages that the model had seen when it answered last; None if it
            has not answered yet.
        digest: The `history` of the next turn.
        open: Whether a tool call has no answer by the model yet.
        calls: Digests of the ids of these tool calls.
    """

    beginning: str | None = None
    history: str | None = None
    digest: str = ""
    open: bool = False
    calls: frozenset[str] = frozenset()


def turn_state(body: Item) -> TurnState:
    """Read where the conversation of a body stands."""
    items = _items(body)
    if not items:
        return TurnState()
    first = next((at for at, item in enumerate(items) if item.get("role") == "user"), 0)
    start, end = _last_answer(items)
    called = [call_id for item in items[start:end] for call_id in _calls(item)]
    returned = [call_id for item in items[end:] for call_id in _results(item)]
    hashed = hashlib.blake2b(digest_size=8)
    hashed.update("".join(map(_mark, items[:start])).encode(errors="surrogatepass"))
    history = digest = hashed.hexdigest()
    if end < len(items):
        # An answer that the client began itself is continued, and is no part of the history.
        hashed.update("".join(map(_mark, items[start:])).encode(errors="surrogatepass"))
        digest = hashed.hexdigest()
    return TurnState(
        beginning=digest_of(_mark(items[first])),
        history=history if end else None,
        digest=digest,
        open=bool(called or returned),
        calls=frozenset(digest_of(call_id) for call_id in (*called, *returned) if call_id),
    )


def since_last_answer(body: Item) -> list[Item]:
    """The model's last answer and what stands behind it; everything if it has not answered yet."""
    items = _items(body)
    start, _ = _last_answer(items)
    return items[start:]


def system_mark(body: Item) -> str:
    """A short text that tells a body's system prompt from others; empty without one."""
    given = body.get("messages", body.get("input"))
    first = next(_objects(given), {}) if isinstance(given, list) else {}
    if first.get("role") in _SYSTEM:
        return _mark(first)
    own = body.get("system", body.get("instructions"))
    return _mark({"content": own}) if own else ""


def _last_answer(items: list[Item]) -> tuple[int, int]:
    """Begin and end of the last answer, a run of items by the model; 0 and 0 without one."""
    end = len(items)
    while end and not _is_models(items[end - 1]):
        end -= 1
    start = end
    while start and _is_models(items[start - 1]):
        start -= 1
    return start, end


def reply_calls(reply: Item) -> list[str]:
    """Digests of the ids of the tool calls in a whole reply, or in an event of a stream."""
    found: list[str] = []
    for choice in _objects(reply.get("choices")):
        for name in ("message", "delta"):
            if isinstance(message := choice.get(name), dict):
                found += _calls(message)
    block, item, response = (reply.get(name) for name in ("content_block", "item", "response"))
    for holder in (block, item):
        if isinstance(holder, dict):
            found += _calls({"role": "assistant", "content": [holder]})
            found += _calls(holder)
    output = response.get("output") if isinstance(response, dict) else reply.get("output")
    for made in _objects(output):
        found += _calls(made)
    found += _calls({"content": reply.get("content")})
    return [digest_of(call_id) for call_id in dict.fromkeys(found) if call_id]


def digest_of(*texts: str) -> str:
    """A digest of texts, 16 hex digits."""
    hashed = hashlib.blake2b(digest_size=8)
    hashed.update("".join(f"{len(text)}:{text}" for text in texts).encode(errors="surrogatepass"))
    return hashed.hexdigest()


def _items(body: Item) -> list[Item]:
    given = body.get("messages", body.get("input"))
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [item for item in _objects(given) if item.get("role") not in _SYSTEM]


def _objects(value: object) -> Iterator[dict[str, Any]]:
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield item


def _is_models(item: Item) -> bool:
    """Whether the model made this item."""
    kind = item.get("type")
    made = isinstance(kind, str) and (kind == "reasoning" or kind.endswith("_call"))
    return made or item.get("role") == "assistant"


def _calls(item: Item) -> Iterator[str]:
    """The ids of tool calls in an item of the model; empty ids where there are none."""
    kind = item.get("type")
    if isinstance(kind, str) and kind.endswith("_call") and "call_id" in item:
        # Calls without such an id are of tools that the provider's servers run.
        yield _text(item["call_id"])
    for call in _objects(item.get("tool_calls")):
        # In a stream only the first piece of a call has its id.
        yield _text(call.get("id"))
    if isinstance(item.get("function_call"), dict):
        yield ""
    for part in _objects(item.get("content")):
        if part.get("type") == "tool_use":
            yield _text(part.get("id"))


def _results(item: Item) -> Iterator[str]:
    """The ids of the tool calls whose results are in an item; empty ids where there are none."""
    kind = item.get("type")
    if isinstance(kind, str) and kind.endswith("_call_output"):
        yield _text(item.get("call_id"))
    if item.get("role") in ("tool", "function"):
        yield _text(item.get("tool_call_id"))
    for part in _objects(item.get("content")):
        if part.get("type") == "tool_result":
            yield _text(part.get("tool_use_id"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _mark(item: Item) -> str:
    """A short text that tells an item from others. Conversations are long, so it is quick."""
    content = item.get("content")
    if isinstance(content, str):
        content_mark = _edges(content)
    elif isinstance(content, list):
        content_mark = "".join(map(_part_mark, content[:_MAX_PARTS]))
    else:
        content_mark = _edges(item.get("output", item.get("arguments")))
    calls = item.get("tool_calls")
    if isinstance(calls, list):
        content_mark += "".join(
            f"{_text(call.get('id'))}," for call in calls[:_MAX_PARTS] if isinstance(call, dict)
        )
    # Anything but a text may be nested deeper than Python can write it.
    named = (item.get("role"), item.get("type"), item.get("call_id", item.get("tool_call_id")))
    role, kind, call = map(_text, named)
    about = f"{role},{kind},{call}"
    return f"{len(about)}:{about}{len(content_mark)}:{content_mark}"


def _part_mark(part: object) -> str:
    # Other fields of a part, such as a mark for the cache, may move from turn to turn.
    if not isinstance(part, dict):
        return _edges(part)
    text = _edges(part.get("text", part.get("content")))
    return f"{_text(part.get('id'))},{_text(part.get('tool_use_id'))},{text}"


def _edges(text: object) -> str:
    if not isinstance(text, str):
        return ""
    return f"{len(text)}:{text[:_EDGE]}{text[-_EDGE:]}"
