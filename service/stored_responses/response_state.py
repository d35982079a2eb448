"""The interface of the state of stored responses and conversations, which outlives every process.

Items are kept in containers: a conversation holds those of all its turns, and a response without a
conversation holds its own. A container is deleted as a whole, with all responses that are in it.
Those that were not used for longest are deleted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.store.list_page import Page
from service.stored_responses.stored_records import (
    Added,
    Quota,
    StoredConversation,
    StoredItem,
    StoredResponse,
)


@dataclass(frozen=True, slots=True)
class StoredAmount:
    """What is stored.

    Attributes:
        entries: Responses, and conversations without one.
        size: Their bytes.
    """

    entries: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Chain:
    """Responses that go on from one another.

    Attributes:
        responses: The responses, oldest first.
        broken: The id of a response that is missing before the first of them; None where the
            chain is complete.
        cut: Whether it is longer, or has more bytes, than was asked for.
    """

    responses: Sequence[StoredResponse]
    broken: str | None = None
    cut: bool = False


class ResponseState(Protocol):
    """Responses, conversations and items.

    Every method may raise StoreUnavailableError, and those that write also StorageFullError. A
    change is made as a whole or not at all.
    """

    async def start(self) -> None:
        """Open what exists already; nothing is made before it is needed."""

    async def stop(self) -> None:
        """Close it."""

    # --- responses

    async def add_response(self, response: StoredResponse, quota: Quota) -> Added:
        """Add a response, and its items behind those of its conversation.

        An item whose id another one of the conversation has is kept under a new one.

        Containers of the tenant that were not used for longest make room for it. The responses
        that it goes on from count as used now.

        Returns:
            What became of it. It is not kept where it has more bytes than the tenant may keep,
            or where its conversation was deleted.
        """

    async def response(self, response_id: str) -> StoredResponse | None:
        """Return a response of any tenant."""

    async def chain(
        self, tenant: str, response_id: str, most_responses: int, most_bytes: int
    ) -> Chain:
        """Return a tenant's response and those that it goes on from."""

    async def remove_response(self, response_id: str) -> bool:
        """Remove a response with its items, also from its conversation.

        Returns:
            Whether it was there.
        """

    # --- conversations

    async def add_conversation(
        self, conversation: StoredConversation, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        """Add a conversation with its first items."""

    async def conversation(self, conversation_id: str) -> StoredConversation | None:
        """Return a conversation of any tenant."""

    async def replace_metadata(self, conversation: StoredConversation) -> bool:
        """Replace a conversation's metadata. Return whether it is there."""

    async def remove_conversation(self, conversation_id: str) -> bool:
        """Remove a conversation, its items, and the responses that were made in it.

        Returns:
            Whether it was there.
        """

    async def add_items(
        self, conversation_id: str, items: Sequence[StoredItem], quota: Quota
    ) -> Added:
        """Add items behind those of a conversation.

        An item whose id another one of the conversation has is kept under a new one.

        Returns:
            What became of them, with their ids. They are not kept where there are too many bytes,
            or where the conversation was deleted.
        """

    async def items(self, container: str, page: Page) -> list[StoredItem]:
        """Return a part of a container's items, in the order in which they were added."""

    async def items_until(self, container: str, number: int, most_bytes: int) -> list[StoredItem]:
        """Return a container's items up to a number, in order.

        They end where there are more bytes than `most_bytes`, with the item that is too much.
        """

    async def item(self, container: str, item_id: str) -> StoredItem | None:
        """Return an item."""

    async def remove_item(self, container: str, item_id: str) -> bool:
        """Remove an item, also from its response. Return whether it was there."""

    # --- retention

    async def remove_unused(self, before_s: float) -> int:
        """Remove what was not used since then, up to some number. Return how many entries."""

    async def amount(self) -> StoredAmount:
        """Return how much is stored, of all tenants."""
