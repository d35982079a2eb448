"""Stored responses and conversations in Redis, for several gateways.

Every change is one script, which Redis runs atomically. Keys, all below `{prefix}:s:`

- `c:ID` hash: a container's tenant, times, bytes, entries, number of its newest item, and a
  conversation's metadata; `m:ID` set: the responses in it
- `i:ID` hash: number → an item's id, a space, and its body; `n:ID` hash: item's id → number;
  `o:ID` sorted set: the numbers
- `r:ID` hash: a response's head, container, and the numbers of its items
- `used` and `used-of:TENANT` sorted sets: container → when it was used last
- `amount` hash: entries and bytes, of each tenant and of all
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson

from service.store.list_page import Page
from service.store.scripted_redis import ScriptedRedis
from service.stored_responses.response_state import Chain, StoredAmount
from service.stored_responses.stored_records import (
    Added,
    Quota,
    StoredConversation,
    StoredItem,
    StoredResponse,
    renewed,
)

_FOLDER = Path(__file__).with_name("scripts")
_NAMES = (
    "add_response",
    "response",
    "chain",
    "remove_response",
    "add_conversation",
    "conversation",
    "replace_metadata",
    "remove_container",
    "add_items",
    "items",
    "items_until",
    "item",
    "remove_item",
    "remove_unused",
)
_SWEPT = 500


class RedisResponses:
    """A `ResponseState` in Redis.

    Args:
        url: The URL of the Redis.
        prefix: The prefix of its keys.
        timeout_s: The longest wait for a reply, in s.
        clock: Returns seconds since 1970 in place of the server, in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        timeout_s: float,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._scripted = ScriptedRedis(
            url, _FOLDER, _NAMES, prefix=prefix, timeout_s=timeout_s, clock=clock
        )
        self._run = self._scripted.run

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        await self._scripted.close()

    # --- responses

    async def add_response(self, response: StoredResponse, quota: Quota) -> Added:
        return _added(
            await self._run(
                "add_response",
                response.head,
                *(item.body for item in response.items),
                id=response.id,
                tenant=response.tenant,
                created=response.created_s,
                seen=response.seen,
                inputs=len(response.input),
                outputs=len(response.output),
                ids=[item.id for item in response.items],
                spare=_spare(response.items),
                conversation=response.conversation,
                previous=response.previous,
                **_most(quota),
            )
        )

    async def response(self, response_id: str) -> StoredResponse | None:
        found = await self._run("response", id=response_id)
        return _response(found) if found else None

    async def chain(
        self, tenant: str, response_id: str, most_responses: int, most_bytes: int
    ) -> Chain:
        broken, cut, found = await self._run(
            "chain",
            tenant=tenant,
            id=response_id,
            most_responses=most_responses,
            most_chain_bytes=most_bytes,
        )
        return Chain([_response(entry) for entry in found[::-1]], _text(broken) or None, bool(cut))

    async def remove_response(self, response_id: str) -> bool:
        return bool(await self._run("remove_response", id=response_id))

    # --- conversations

    async def add_conversation(
        self, conversation: StoredConversation, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        return _added(
            await self._run(
                "add_conversation",
                orjson.dumps(dict(conversation.metadata)),
                *(item.body for item in items),
                id=conversation.id,
                tenant=conversation.tenant,
                created=conversation.created_s,
                ids=[item.id for item in items],
                spare=_spare(items),
                **_most(quota),
            )
        )

    async def conversation(self, conversation_id: str) -> StoredConversation | None:
        found = await self._run("conversation", id=conversation_id)
        if not found:
            return None
        name, tenant, created_s, metadata, used_s, newest = found
        return StoredConversation(
            _text(name),
            _text(tenant),
            int(created_s),
            orjson.loads(metadata),
            float(used_s),
            int(newest),
        )

    async def replace_metadata(self, conversation: StoredConversation) -> bool:
        metadata = orjson.dumps(dict(conversation.metadata))
        return bool(await self._run("replace_metadata", metadata, id=conversation.id))

    async def remove_conversation(self, conversation_id: str) -> bool:
        return bool(await self._run("remove_container", id=conversation_id))

    async def add_items(
        self, conversation_id: str, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        return _added(
            await self._run(
                "add_items",
                *(item.body for item in items),
                id=conversation_id,
                ids=[item.id for item in items],
                spare=_spare(items),
                **_most(quota),
            )
        )

    async def items(self, container: str, page: Page) -> list[StoredItem]:
        found = await self._run(
            "items",
            id=container,
            limit=page.limit,
            after=page.after,
            ascending=page.ascending or None,
        )
        return [_item(entry) for entry in found]

    async def items_until(self, container: str, number: int, most_bytes: int) -> list[StoredItem]:
        found = await self._run("items_until", id=container, number=number, most_size=most_bytes)
        return [_item(entry) for entry in found]

    async def item(self, container: str, item_id: str) -> StoredItem | None:
        found = await self._run("item", id=container, item=item_id)
        return _item(found) if found else None

    async def remove_item(self, container: str, item_id: str) -> bool:
        return bool(await self._run("remove_item", id=container, item=item_id))

    # --- retention

    async def remove_unused(self, before_s: float) -> int:
        return int(await self._run("remove_unused", before=before_s, most=_SWEPT))

    async def amount(self) -> StoredAmount:
        key = f"{self._scripted.prefix}:s:amount"
        redis = self._scripted.redis
        found = await self._scripted.call(lambda: redis.hmget(key, ["entries", "bytes"]))
        return StoredAmount(*(int(value or 0) for value in found))


def _most(quota: Quota) -> dict[str, int]:
    return {"most_entries": quota.most_entries, "most_bytes": quota.most_bytes}


def _spare(items: Sequence[StoredItem]) -> list[str]:
    """Ids for those items whose own another one has."""
    return [renewed(item).id for item in items]


def _added(found: Sequence[Any]) -> Added:
    kept, evicted, *ids = found
    return Added(bool(kept), int(evicted), tuple(map(_text, ids)))


def _response(found: Sequence[Any]) -> StoredResponse:
    name, tenant, created_s, head, given, made, previous, container, seen, used_s = found
    held = None if container == name else _text(container)
    return StoredResponse(
        _text(name),
        _text(tenant),
        int(created_s),
        head,
        tuple(map(_item, given)),
        tuple(map(_item, made)),
        None if previous is None else _text(previous),
        held,
        int(seen),
        float(used_s),
    )


def _item(found: bytes) -> StoredItem:
    item_id, _, body = found.partition(b" ")
    return StoredItem(item_id.decode(), body)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
