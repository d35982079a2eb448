"""Prefix affinity: which engine has a conversation in its prefix cache.

A gateway remembers the conversations that it forwarded itself. Those of other gateways it finds in
the pools' snapshots. Conversations are known by digests; their texts are not kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from service.broker.pool_state import BootId, Place, PoolView
from service.broker.selection import PrefixCacheHint
from service.gateway.request.conversation_turns import (
    Item,
    digest_of,
    since_last_answer,
    system_mark,
)
from service.gateway.request.parsing import InferenceRequest
from service.http.token_usage import estimate_tokens

_MOST = 20_000


class PrefixAffinity:
    """The latest conversations of one gateway, forgotten in the order of their use."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Place] = OrderedDict()

    def hint(
        self, request: InferenceRequest, pools: Iterable[PoolView] = ()
    ) -> PrefixCacheHint | None:
        """Where the beginning of this conversation is cached, if known.

        Args:
            request: The request.
            pools: The pools whose snapshots may know it.
        """
        if request.turn.history is None:
            return None
        prefix = _prefix(request, request.turn.history)
        found = self._known.get(prefix) or next(
            (
                (expert, view.boot)
                for view in pools
                if (expert := view.snapshot.prefixes.get(prefix)) is not None
            ),
            None,
        )
        if found is None:
            return None
        new = estimate_tokens(sum(map(_length, since_last_answer(request.data))))
        return PrefixCacheHint(*found, max(0, request.prompt_tokens - new))

    def record_answer(self, request: InferenceRequest, expert: str, boot: BootId) -> None:
        """Record that an expert's engine in this pool has the request in its prefix cache."""
        if not (key := prefix_of(request)):
            return
        self._known[key] = (expert, boot)
        self._known.move_to_end(key)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)

    def forget(self, experts: Collection[str]) -> None:
        """Forget the conversations that these experts answered."""
        for key in [key for key, (expert, _) in self._known.items() if expert in experts]:
            del self._known[key]


def prefix_of(request: InferenceRequest) -> str:
    """The digest by which the next turn finds this one's prefix; empty for no conversation."""
    return _prefix(request, request.turn.digest) if request.turn.digest else ""


def _prefix(request: InferenceRequest, history: str) -> str:
    # Apart as in the engines: where two tenants share no prefix, neither is warm by the other.
    return digest_of(request.tenant.cache_salt, system_mark(request.data), history)


def _length(item: Item) -> int:
    content = item.get("content", item.get("output", item.get("arguments")))
    return len(content if isinstance(content, str) else repr(content))
