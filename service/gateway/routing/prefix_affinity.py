"""Prefix affinity: remembers which engine has a conversation in its prefix cache.

Each gateway keeps its own, by a hash of the messages; it does not keep the text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from service.broker.pool_state import BootId, Place
from service.broker.selection import PrefixCacheHint
from service.gateway.request.parsing import InferenceRequest
from service.http.token_usage import estimate_tokens

_MOST = 20_000


class PrefixAffinity:
    """The latest conversations of one gateway, forgotten in the order of their use."""

    def __init__(self) -> None:
        self._known: OrderedDict[int, Place] = OrderedDict()

    def hint(self, request: InferenceRequest) -> PrefixCacheHint | None:
        """Where the beginning of this conversation is cached, if known."""
        messages = _messages(request)
        answered = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if not answered:
            return None
        before = messages[: answered[-1]]
        found = self._known.get(_key(request, before))
        if found is None:
            return None
        return PrefixCacheHint(*found, estimate_tokens(sum(map(_length, before))))

    def record_answer(self, request: InferenceRequest, expert: str, boot: BootId) -> None:
        """Record that an expert's engine in this pool has the request in its prefix cache."""
        messages = _messages(request)
        if not messages:
            return
        key = _key(request, messages)
        self._known[key] = (expert, boot)
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)

    def forget(self, experts: Collection[str]) -> None:
        """Forget the conversations that these experts answered."""
        for key in [key for key, (expert, _) in self._known.items() if expert in experts]:
            del self._known[key]


def _messages(request: InferenceRequest) -> list[Mapping[str, Any]]:
    """The request's messages; empty where they are not valid, which the engine refuses."""
    given = request.data.get("messages")
    if isinstance(given, list) and all(isinstance(item, dict) for item in given):
        return given
    return []


def _key(request: InferenceRequest, messages: Sequence[Mapping[str, Any]]) -> int:
    # Python's own hash of strings: quick, and different in every process.
    turns = tuple(
        (_text(message.get("role")), _text(message.get("content"))) for message in messages
    )
    # Apart as in the engines: where two tenants share no prefix, neither is warm by the other.
    return hash((request.tenant.cache_salt, turns))


def _text(content: object) -> str:
    return content if isinstance(content, str) else repr(content)


def _length(message: Mapping[str, Any]) -> int:
    return len(_text(message.get("content")))
