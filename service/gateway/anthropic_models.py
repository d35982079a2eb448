"""The list of models as Anthropic's clients know it. Pure.

Source: https://docs.anthropic.com/en/api/models-list
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from service.errors import InvalidRequestError

_MOST, _USUAL = 1000, 20
_LIFECYCLES = ("active", "deprecated", "retired")


def model_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One model of OpenAI's list in Anthropic's form."""
    name = entry["id"]
    created = datetime.fromtimestamp(entry["created"], UTC).isoformat()
    context = entry.get("max_model_len")
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created.replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": context,
        "max_tokens": context,
    }


def chats(entry: Mapping[str, Any]) -> bool:
    """Whether a model of OpenAI's list answers Anthropic's Messages."""
    return "chat" in entry["coe"]["capabilities"]


def page_of(entries: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of Anthropic's list, with the models that answer Messages.

    Args:
        entries: The entries of OpenAI's list.
        query: The parameters `limit`, `after_id`, `before_id` and `lifecycle`.

    Raises:
        InvalidRequestError: A parameter is not valid.
    """
    models = [model_of(entry) for entry in entries if chats(entry)]
    lifecycle = query.get("lifecycle[]", query.get("lifecycle", "active"))
    if lifecycle not in _LIFECYCLES:
        raise InvalidRequestError(
            f"`lifecycle` must be one of {', '.join(_LIFECYCLES)}", param="lifecycle"
        )
    if lifecycle != "active":
        models = []
    given = query.get("limit", str(_USUAL))
    if not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= _MOST:
        raise InvalidRequestError(f"`limit` must be an integer from 1 to {_MOST}", param="limit")
    limit = int(given)
    after, before = query.get("after_id"), query.get("before_id")
    if after is not None and before is not None:
        raise InvalidRequestError("give one of `after_id` and `before_id`", param="after_id")
    if before is not None:
        head = models[: _position(models, before, "before_id")]
        shown, more = head[-limit:], len(head) > limit
    else:
        tail = models if after is None else models[_position(models, after, "after_id") + 1 :]
        shown, more = tail[:limit], len(tail) > limit
    return {
        "data": shown,
        "has_more": more,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
    }


def _position(models: Sequence[Mapping[str, Any]], name: str, param: str) -> int:
    for i, model in enumerate(models):
        if model["id"] == name:
            return i
    raise InvalidRequestError(f"`{param}` names no model: {name[:128]!r}", param=param)
