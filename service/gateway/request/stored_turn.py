"""Reads what a request says about stored responses, and puts the conversation before its input.

Experts get the whole conversation, and never an id of a stored response: they keep nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from service.errors import InvalidRequestError
from service.gateway.request.large_bodies import apart
from service.stored_responses.conversation_service import ConversationService
from service.stored_responses.response_service import ResponseService, StoredContext
from service.stored_responses.stored_records import StoredItem, bodies, input_items, new_response_id
from service.types import BATCH, Tenant

RESPONSES = "/v1/responses"
INPUT_TOKENS = "/v1/responses/input_tokens"


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """One turn of a stored conversation.

    Attributes:
        response_id: The id of the response to it.
        keeps: Whether the response is stored.
        own: How many of the input's items are this turn's.
        previous: The response that it goes on from; None without one.
        thread: A name that all turns of its conversation share; None where nothing is stored.
        known: The ids of the items before it.
        conversation: The conversation that it is added to; None without one.
        seen: The number of the last item of that conversation before it.
    """

    response_id: str
    keeps: bool
    own: int
    previous: str | None = None
    thread: str | None = None
    known: frozenset[str] = frozenset()
    conversation: str | None = None
    seen: int = 0

    def own_items(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """The items that this turn adds, from the body that experts get."""
        items = input_items(data.get("input"))
        return items[len(items) - self.own :]


class StoredTurns:
    """Opens the turns of stored conversations.

    Args:
        service: The stored responses.
        conversations: The conversations.
    """

    def __init__(self, service: ResponseService, conversations: ConversationService) -> None:
        self._service = service
        self._conversations = conversations

    async def begin(
        self, raw: bytes, tenant: Tenant, *, counts: bool = False
    ) -> tuple[bytes, StoredTurn | None]:
        """Put the conversation that a request goes on from before its input.

        Args:
            raw: The request's body, whose depth and number of values are checked already.
            tenant: The tenant that sent it.
            counts: Whether its tokens are only counted.

        Returns:
            The body for experts, which says nothing about stored responses, and the turn; None for
            a body that is not valid, for one whose tokens are counted, and for lines of batches,
            which can't use stored responses.

        Raises:
            InvalidRequestError: A field is not valid, or the response can't be gone on from.
            UnknownModelError: The tenant has no such response or conversation.
            BodyTooLargeError: The conversation has too many bytes.
            StoreUnavailableError: It can't be read.
        """
        if tenant.priority == BATCH:
            return raw, None
        try:
            data = await apart(partial(orjson.loads, raw), len(raw))
        except orjson.JSONDecodeError:
            return raw, None
        given = data.get("input") if isinstance(data, dict) else None
        if not isinstance(given, (str, list)):
            return raw, None
        store = data.get("store")
        if store is not None and not isinstance(store, bool):
            raise InvalidRequestError("`store` must be true or false", param="store")
        keeps = self._service.config.store_by_default if store is None else store
        previous = data.pop("previous_response_id", None)
        if previous is not None and not isinstance(previous, str):
            raise InvalidRequestError(
                "`previous_response_id` must be the id of a response", param="previous_response_id"
            )
        conversation = _conversation(data.pop("conversation", None))
        if conversation is not None and previous is not None:
            raise InvalidRequestError(
                "`conversation` and `previous_response_id` exclude each other",
                param="previous_response_id",
            )
        if conversation is not None and store is False:
            raise InvalidRequestError(
                "`conversation` keeps its turns; `store: false` can't be had with it", param="store"
            )
        before: StoredContext | None = None
        if previous is not None:
            before = await self._service.context(tenant, previous)
        elif conversation is not None:
            before = await self._conversations.context(tenant, conversation)
            keeps = True
        own = input_items(given)
        if isinstance(given, list) and len(own) != len(given):
            # Experts refuse items that are no objects.
            keeps = False
        if not counts:
            # Neither an engine nor a remote server keeps what is kept here.
            data["store"] = False
        items = () if before is None else before.items
        size = len(raw) + sum(len(item.body) for item in items)
        write = partial(_written, data, items, given if isinstance(given, list) else own)
        try:
            whole = await apart(write, size)
        except orjson.JSONEncodeError:
            raise InvalidRequestError("the body is nested too deep") from None
        self._service.check_size(len(whole))
        if counts:
            return whole, None
        response_id = new_response_id()
        first = response_id if keeps else None
        turn = StoredTurn(
            response_id,
            keeps,
            len(own),
            previous,
            first if before is None else before.thread,
            frozenset() if before is None else frozenset(item.id for item in before.items),
            conversation,
            0 if before is None else before.seen,
        )
        return whole, turn


def _conversation(given: object) -> str | None:
    """The id of the conversation in a body's `conversation`, a text or an object with `id`.

    Raises:
        InvalidRequestError: It is neither.
    """
    if given is None:
        return None
    found = given.get("id") if isinstance(given, dict) else given
    if not isinstance(found, str):
        raise InvalidRequestError(
            "`conversation` must be the id of a conversation, or an object with it as `id`",
            param="conversation",
        )
    return found


def _written(data: dict[str, Any], before: Sequence[StoredItem], own: Sequence[Any]) -> bytes:
    """The body with the items before its own."""
    if before:
        data = {**data, "input": orjson.Fragment(_joined(before, own))}
    return orjson.dumps(data)


def _joined(before: Sequence[StoredItem], own: Sequence[Any]) -> bytes:
    added = orjson.dumps(own)
    comma = b"," if before and own else b""
    return bodies(before)[:-1] + comma + added[1:]
