"""Conversations as clients see them: items that turns are added to, under one name.

A tenant sees its own conversations only; those of others are as unknown as any other id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from service.errors import InvalidRequestError, RateLimitExceededError, UnknownModelError
from service.http.client_metadata import check_metadata
from service.store.list_page import Page
from service.stored_responses.response_service import ResponseService, StoredContext, unknown_item
from service.stored_responses.response_state import ResponseState
from service.stored_responses.stored_records import (
    StoredConversation,
    StoredItem,
    new_conversation_id,
    stored_items,
)
from service.types import Tenant

MAX_NEW_ITEMS = 20


class ConversationService:
    """The conversations of one service.

    Args:
        responses: The stored responses, whose state and bounds they share.
        state: That state.
        clock: Returns seconds since 1970.
    """

    def __init__(
        self,
        responses: ResponseService,
        state: ResponseState,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._responses = responses
        self._state = state
        self._clock = clock

    async def context(self, tenant: Tenant, conversation_id: str) -> StoredContext:
        """Return what a request goes on from that names a conversation.

        Raises:
            UnknownModelError: The tenant has no such conversation.
            BodyTooLargeError: It has too many bytes.
            StoreUnavailableError: It can't be read.
        """
        found = await self.conversation(tenant, conversation_id, param="conversation")
        items = await self._responses.items_until(found.id, found.newest)
        return StoredContext(items, found.id, found.newest)

    async def create(self, tenant: Tenant, body: Mapping[str, Any]) -> StoredConversation:
        """Create a conversation.

        Args:
            tenant: The tenant whose conversation it is.
            body: The body of `POST /v1/conversations`.

        Raises:
            InvalidRequestError: A field is not valid.
            RateLimitExceededError: It has more bytes than the tenant may keep.
            StorageFullError: The disk is full; nothing was stored.
        """
        _check_fields(body, ("items", "metadata"))
        conversation = StoredConversation(
            new_conversation_id(),
            tenant.name,
            int(self._clock()),
            check_metadata(body.get("metadata")) or {},
        )
        items = stored_items(_new_items(body.get("items"), least=0))
        added = await self._state.add_conversation(conversation, items, self._responses.quota)
        if not self._responses.count(added):
            raise self._no_room()
        return conversation

    async def conversation(
        self, tenant: Tenant, conversation_id: str, *, param: str = "id"
    ) -> StoredConversation:
        """Return a tenant's conversation.

        Raises:
            UnknownModelError: The tenant has no such conversation; `param` names the field.
        """
        found = await self._state.conversation(conversation_id)
        if (
            found is None
            or found.tenant != tenant.name
            or self._responses.has_expired(found.used_s)
        ):
            raise UnknownModelError(
                f"no conversation {conversation_id[:64]!r} is kept here",
                param=param,
                code="conversation_not_found",
            )
        return found

    async def update(
        self, tenant: Tenant, conversation_id: str, body: Mapping[str, Any]
    ) -> StoredConversation:
        """Replace a conversation's metadata.

        Raises:
            UnknownModelError: The tenant has no such conversation.
            InvalidRequestError: A field is not valid.
            StorageFullError: The disk is full; nothing was changed.
        """
        found = await self.conversation(tenant, conversation_id)
        _check_fields(body, ("metadata",))
        if "metadata" not in body:
            raise InvalidRequestError("`metadata` is required", param="metadata")
        changed = found.with_metadata(check_metadata(body["metadata"]) or {})
        if not await self._state.replace_metadata(changed):
            # It was deleted meanwhile.
            await self.conversation(tenant, conversation_id)
        return changed

    async def delete(self, tenant: Tenant, conversation_id: str) -> None:
        """Delete a conversation for good, with its items and the responses that were made in it.

        Raises:
            UnknownModelError: The tenant has no such conversation.
        """
        found = await self.conversation(tenant, conversation_id)
        await self._state.remove_conversation(found.id)

    async def add_items(
        self, tenant: Tenant, conversation_id: str, body: Mapping[str, Any]
    ) -> list[StoredItem]:
        """Add items behind those of a conversation, and return them.

        Raises:
            UnknownModelError: The tenant has no such conversation.
            InvalidRequestError: A field is not valid.
            RateLimitExceededError: It has more bytes than the tenant may keep.
            StorageFullError: The disk is full; nothing was stored.
        """
        found = await self.conversation(tenant, conversation_id)
        _check_fields(body, ("items",))
        items = stored_items(_new_items(body.get("items"), least=1))
        added = await self._state.add_items(found.id, items, self._responses.quota)
        if not self._responses.count(added):
            # It was deleted meanwhile, or there is no room.
            await self.conversation(tenant, conversation_id)
            raise self._no_room()
        return [StoredItem(name, item.body) for name, item in zip(added.ids, items, strict=True)]

    async def items(self, tenant: Tenant, conversation_id: str, page: Page) -> list[StoredItem]:
        """Return a part of a conversation's items.

        Raises:
            UnknownModelError: The tenant has no such conversation, or it has no item `page.after`.
        """
        found = await self.conversation(tenant, conversation_id)
        if page.after is not None:
            await self._item(found, page.after, "after")
        return await self._state.items(found.id, page)

    async def item(self, tenant: Tenant, conversation_id: str, item_id: str) -> StoredItem:
        """Return an item of a conversation.

        Raises:
            UnknownModelError: The tenant has no such conversation, or it has no such item.
        """
        found = await self.conversation(tenant, conversation_id)
        return await self._item(found, item_id, "item_id")

    async def delete_item(
        self, tenant: Tenant, conversation_id: str, item_id: str
    ) -> StoredConversation:
        """Delete an item for good, and return its conversation.

        Raises:
            UnknownModelError: The tenant has no such conversation, or it has no such item.
        """
        found = await self.conversation(tenant, conversation_id)
        if not await self._state.remove_item(found.id, item_id):
            raise unknown_item(item_id, "item_id")
        return found

    async def _item(self, conversation: StoredConversation, item_id: str, param: str) -> StoredItem:
        found = await self._state.item(conversation.id, item_id)
        if found is None:
            raise unknown_item(item_id, param)
        return found

    def _no_room(self) -> RateLimitExceededError:
        return RateLimitExceededError(
            f"a conversation may have {self._responses.quota.most_bytes} bytes; delete items, or "
            "begin another one",
            code="storage_quota_exceeded",
        )


def _check_fields(body: Mapping[str, Any], allowed: Sequence[str]) -> None:
    if unknown := body.keys() - {*allowed}:
        name = min(unknown)[:64]
        raise InvalidRequestError(
            f"there is no field {name!r}; allowed: {', '.join(allowed)}", param=name
        )


def _new_items(given: object, *, least: int) -> list[dict[str, Any]]:
    """Check a body's `items`.

    Raises:
        InvalidRequestError: They are too many or too few, or one is no item.
    """
    items = [] if given is None else given
    if not isinstance(items, list) or not least <= len(items) <= MAX_NEW_ITEMS:
        raise InvalidRequestError(
            f"`items` must be a list of {least} to {MAX_NEW_ITEMS} items", param="items"
        )
    for number, item in enumerate(items):
        if not isinstance(item, dict) or not any(
            isinstance(item.get(name), str) for name in ("type", "role")
        ):
            raise InvalidRequestError(
                f"`items[{number}]` must be an object with `type` or `role`",
                param=f"items[{number}]",
            )
    return items
