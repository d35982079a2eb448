"""Stored responses as clients see them: what they may do, and what they get to know.

A tenant sees its own responses only; those of others are as unknown as any other id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.config import ResponsesConfig
from service.errors import BodyTooLargeError, CoeError, InvalidRequestError, UnknownModelError
from service.store.list_page import Page
from service.stored_responses.response_state import ResponseState
from service.stored_responses.stored_records import Added, Quota, StoredItem, StoredResponse
from service.task_cancellation import cancel_and_wait
from service.types import Tenant

log = logging.getLogger("coe.responses")

_SWEEP_S = 3600.0
# A response in one of these states can be gone on from.
CONTINUED = ("completed", "incomplete")


@dataclass(frozen=True, slots=True)
class StoredContext:
    """What a request goes on from.

    Attributes:
        items: The items before its own.
        thread: The name of the conversation: its id, or that of its first response.
        seen: The number of the last item, where they are those of a conversation.
    """

    items: Sequence[StoredItem]
    thread: str
    seen: int = 0


class ResponseService:
    """The stored responses of one service.

    Args:
        config: The section `responses`.
        state: Their state.
        max_bytes: Most bytes of a conversation that a request may go on from.
        evicted: Called with the number of entries that made room for another one.
        clock: Returns seconds since 1970.

    Attributes:
        quota: What each tenant may keep.
    """

    def __init__(
        self,
        config: ResponsesConfig,
        state: ResponseState,
        *,
        max_bytes: int,
        evicted: Callable[[int], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._state = state
        self._max_bytes = max_bytes
        self._evicted = evicted
        self._clock = clock
        self.quota = Quota(config.tenant_entries, config.tenant_bytes)
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to delete what has expired."""
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stop the background task."""
        await cancel_and_wait(self._sweeping)

    # --- turns

    async def context(self, tenant: Tenant, response_id: str) -> StoredContext:
        """Return what a request goes on from that names a previous response.

        Raises:
            UnknownModelError: The tenant has no such response, or one before it was deleted.
            InvalidRequestError: The response has failed, or the chain is too long.
            BodyTooLargeError: The conversation has too many bytes.
            StoreUnavailableError: It can't be read.
        """
        chain = await self._state.chain(
            tenant.name, response_id, self.config.max_chain, self._max_bytes
        )
        found = chain.responses
        if not found or self.has_expired(found[-1].used_s):
            raise UnknownModelError(
                f"no response {response_id[:64]!r} is kept here",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if chain.broken is not None:
            raise UnknownModelError(
                f"{response_id} can't be gone on from: the response {chain.broken} before it was "
                "deleted",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if chain.cut and len(found) > self.config.max_chain:
            raise InvalidRequestError(
                f"the conversation has more than {self.config.max_chain} responses; begin another "
                "one with its last items as `input`",
                param="previous_response_id",
            )
        if chain.cut:
            raise self._too_long()
        if found[-1].status not in CONTINUED:
            raise InvalidRequestError(
                f"{response_id} can't be gone on from: its status is {found[-1].status}",
                param="previous_response_id",
            )
        before = await self._before_first(found[0])
        items = [*before, *(item for response in found for item in response.items)]
        return StoredContext(items, found[0].container)

    async def _before_first(self, first: StoredResponse) -> list[StoredItem]:
        """The items of the conversation that a chain's first response was made in."""
        if first.conversation is None:
            return []
        return await self.items_until(first.conversation, first.seen)

    async def items_until(self, conversation_id: str, number: int) -> list[StoredItem]:
        """Return the items of a conversation up to a number.

        Raises:
            BodyTooLargeError: They have too many bytes for a request.
        """
        items = await self._state.items_until(conversation_id, number, self._max_bytes)
        self.check_size(sum(len(item.body) for item in items))
        return items

    def check_size(self, size: int) -> None:
        """Check the bytes of a request together with what it goes on from.

        Raises:
            BodyTooLargeError: They are too many.
        """
        if size > self._max_bytes:
            raise self._too_long()

    def _too_long(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"with the conversation that it goes on from, the request has more than the "
            f"{self._max_bytes} bytes allowed"
        )

    async def keep(self, response: StoredResponse) -> bool:
        """Store a response. Return whether there was room for it.

        Raises:
            StorageFullError: The disk is full; nothing was stored.
            StoreUnavailableError: It can't be written.
        """
        return self.count(await self._state.add_response(response, self.quota))

    def count(self, added: Added) -> bool:
        """Count what was evicted. Return whether the new entry is kept."""
        if added.evicted:
            self._evicted(added.evicted)
        return added.kept

    # --- endpoints

    async def response(self, tenant: Tenant, response_id: str) -> StoredResponse:
        """Return a tenant's response.

        Raises:
            UnknownModelError: The tenant has no such response.
        """
        found = await self._state.response(response_id)
        if found is None or found.tenant != tenant.name or self.has_expired(found.used_s):
            raise UnknownModelError(
                f"no response {response_id[:64]!r} is kept here",
                param="id",
                code="response_not_found",
            )
        return found

    async def input_items(self, tenant: Tenant, response_id: str, page: Page) -> list[StoredItem]:
        """Return a part of the items that a response was made from, earlier turns included.

        Raises:
            UnknownModelError: The tenant has no such response, or it has no item `page.after`.
        """
        response = await self.response(tenant, response_id)
        items = [*await self._before(tenant, response), *response.input]
        if not page.ascending:
            items.reverse()
        if page.after is None:
            return items[: page.limit]
        ids = [item.id for item in items]
        if page.after not in ids:
            raise unknown_item(page.after, "after")
        start = ids.index(page.after) + 1
        return items[start : start + page.limit]

    async def _before(self, tenant: Tenant, response: StoredResponse) -> list[StoredItem]:
        """The items of earlier turns that are still there."""
        if response.previous is None:
            return await self._before_first(response)
        most = self.config.max_chain
        chain = await self._state.chain(tenant.name, response.previous, most, self._max_bytes)
        first = chain.responses[0] if chain.responses and chain.broken is None else response
        before = await self._before_first(first)
        return [*before, *(item for earlier in chain.responses for item in earlier.items)]

    async def delete(self, tenant: Tenant, response_id: str) -> None:
        """Delete a tenant's response for good, with its items.

        Raises:
            UnknownModelError: The tenant has no such response.
        """
        response = await self.response(tenant, response_id)
        await self._state.remove_response(response.id)

    def has_expired(self, used_s: float) -> bool:
        """Whether what was used last at this time is kept no more."""
        return used_s < self._clock() - self.config.retention_days * 86_400

    # --- retention

    async def sweep(self) -> None:
        """Delete what has expired."""
        before_s = self._clock() - self.config.retention_days * 86_400
        while await self._state.remove_unused(before_s):
            pass

    async def _sweep(self) -> None:
        while True:
            try:
                await self.sweep()
            except CoeError as error:
                log.error("expired responses can't be deleted: %s", error.code)
            except Exception as error:
                log.error("expired responses can't be deleted: %s", type(error).__name__)
            await asyncio.sleep(_SWEEP_S)


def unknown_item(item_id: str, param: str) -> UnknownModelError:
    """The error for an item that is not there."""
    return UnknownModelError(
        f"no item {item_id[:64]!r} is kept here", param=param, code="item_not_found"
    )
