"""Records of stored responses, conversations and their items. Pure.

The objects have OpenAI's shapes: https://platform.openai.com/docs/api-reference/responses/object
and https://platform.openai.com/docs/api-reference/conversations/object.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}\Z")
# OpenAI's prefixes of ids, by the type of an item.
_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def new_response_id() -> str:
    """Return an id that nobody can guess."""
    return "resp_" + secrets.token_hex(24)


def new_conversation_id() -> str:
    """Return an id that nobody can guess."""
    return "conv_" + secrets.token_hex(24)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item of a conversation.

    Attributes:
        id: Its id, for clients.
        body: Its JSON, as experts get it: as the client or the expert wrote it.
    """

    id: str
    body: bytes

    @property
    def size(self) -> int:
        """The bytes that it takes."""
        return len(self.id) + len(self.body)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object of an item."""
        item: dict[str, Any] = orjson.loads(self.body)
        content = item.get("content")
        if "type" not in item and "role" in item:
            item["type"] = "message"
        if item.get("type") == "message":
            item.setdefault("status", "completed")
            if isinstance(content, str):
                answered = item.get("role") == "assistant"
                part: dict[str, Any] = {"type": "output_text", "text": content, "annotations": []}
                item["content"] = [part if answered else {"type": "input_text", "text": content}]
        return {**item, "id": self.id}


def stored_items(items: Iterable[Mapping[str, Any]], known: Iterable[str] = ()) -> list[StoredItem]:
    """Return items with the ids under which they are stored.

    An item keeps the id that it has, unless another one has it already.

    Args:
        items: The items, as experts get them.
        known: The ids that others have.
    """
    taken = {*known}
    found = []
    for item in items:
        given = item.get("id")
        item_id = given if isinstance(given, str) and _ID.match(given) else ""
        if not item_id or item_id in taken:
            item_id = _new_item_id(_prefix(item))
        taken.add(item_id)
        found.append(StoredItem(item_id, orjson.dumps(item)))
    return found


def renewed(item: StoredItem) -> StoredItem:
    """Return an item with an id that no other one has."""
    prefix = item.id.partition("_")[0]
    known = prefix in _PREFIXES.values()
    return replace(item, id=_new_item_id(prefix if known else "item"))


def _new_item_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


def _prefix(item: Mapping[str, Any]) -> str:
    kind = item.get("type", "message")
    return _PREFIXES.get(kind, "item") if isinstance(kind, str) else "item"


def input_items(given: object) -> list[dict[str, Any]]:
    """Return the items of a body's `input`; a text is a message of the user."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that has ended. Times are seconds since 1970.

    Attributes:
        id: Its id.
        tenant: The tenant that it belongs to.
        created_s: When it was made.
        head: JSON of OpenAI's object `response`, without `output`.
        input: The items that the client added in this turn.
        output: The items that the expert made.
        previous: The response that it goes on from; None without one.
        conversation: The conversation that holds its items; None where it holds them itself.
        seen: The number of the last item of its conversation that it goes on from.
        used_s: When it, or a response that goes on from it, was made last; set by the state.
    """

    id: str
    tenant: str
    created_s: int
    head: bytes
    input: tuple[StoredItem, ...] = ()
    output: tuple[StoredItem, ...] = ()
    previous: str | None = None
    conversation: str | None = None
    seen: int = 0
    used_s: float = 0.0

    @property
    def container(self) -> str:
        """The id under which its items are kept, and with which they are deleted."""
        return self.conversation or self.id

    @property
    def items(self) -> tuple[StoredItem, ...]:
        """What it adds to a conversation."""
        return self.input + self.output

    @property
    def size(self) -> int:
        """The bytes that it takes, items included."""
        return len(self.head) + sum(item.size for item in self.items)

    @property
    def status(self) -> str:
        """OpenAI's status of it."""
        return str(orjson.loads(self.head).get("status"))

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object `response`."""
        head: dict[str, Any] = orjson.loads(self.head)
        return {**head, "output": [orjson.loads(item.body) for item in self.output]}


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation without its items. Times are seconds since 1970.

    Attributes:
        id: Its id.
        tenant: The tenant that it belongs to.
        created_s: When it was made.
        metadata: What the client attached to it.
        used_s: When something was last added to it; set by the state.
        newest: The number of its newest item; 0 without one.
    """

    id: str
    tenant: str
    created_s: int
    metadata: Mapping[str, str] = field(default_factory=dict)
    used_s: float = 0.0
    newest: int = 0

    def with_metadata(self, metadata: Mapping[str, str]) -> StoredConversation:
        """The conversation with other metadata."""
        return replace(self, metadata=metadata)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object `conversation`."""
        return {
            "id": self.id,
            "object": "conversation",
            "created_at": self.created_s,
            "metadata": dict(self.metadata),
        }


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may keep.

    Attributes:
        most_entries: Responses and conversations.
        most_bytes: Bytes of all of them.
    """

    most_entries: int
    most_bytes: int


@dataclass(frozen=True, slots=True)
class Added:
    """What became of something that was to be stored.

    Attributes:
        kept: Whether it is stored.
        evicted: Entries of the tenant that were deleted to make room for it.
        ids: The ids under which items are kept that were added to a conversation.
    """

    kept: bool
    evicted: int = 0
    ids: tuple[str, ...] = ()


def bodies(items: Sequence[StoredItem]) -> bytes:
    """A JSON list of items, as experts get it."""
    return b"[" + b",".join(item.body for item in items) + b"]"
