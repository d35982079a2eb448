"""`/v1/conversations`: clients keep items that turns of `/v1/responses` are added to."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.gateway.dependencies import (
    ConversationEndpoints,
    CountedTenant,
    Services,
    json_object,
    json_response,
)
from service.gateway.list_pages import ListPage, page_of, to_list
from service.stored_responses.conversation_service import MAX_NEW_ITEMS

router = APIRouter()

_MAX_ITEMS = 100
_USUAL_ITEMS = 20


@router.post("/v1/conversations")
async def create_conversation(
    request: Request,
    services: Services,
    conversations: ConversationEndpoints,
    tenant: CountedTenant,
) -> Response:
    """Begin a conversation."""
    body = await json_object(request, services, services.config.server.max_body_bytes)
    return json_response((await conversations.create(tenant, body)).to_json())


@router.get("/v1/conversations/{id}")
async def get_conversation(
    request: Request, conversations: ConversationEndpoints, tenant: CountedTenant
) -> Response:
    """Return a conversation."""
    found = await conversations.conversation(tenant, request.path_params["id"])
    return json_response(found.to_json())


@router.post("/v1/conversations/{id}")
async def update_conversation(
    request: Request,
    services: Services,
    conversations: ConversationEndpoints,
    tenant: CountedTenant,
) -> Response:
    """Replace a conversation's metadata."""
    body = await json_object(request, services, services.config.server.max_body_bytes)
    changed = await conversations.update(tenant, request.path_params["id"], body)
    return json_response(changed.to_json())


@router.delete("/v1/conversations/{id}")
async def delete_conversation(
    request: Request, conversations: ConversationEndpoints, tenant: CountedTenant
) -> Response:
    """Delete a conversation for good, with its items and its responses."""
    conversation_id = request.path_params["id"]
    await conversations.delete(tenant, conversation_id)
    gone = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
    return json_response(gone)


@router.post("/v1/conversations/{id}/items")
async def add_items(
    request: Request,
    services: Services,
    conversations: ConversationEndpoints,
    tenant: CountedTenant,
) -> Response:
    """Add items to a conversation."""
    body = await json_object(request, services, services.config.server.max_body_bytes)
    added = await conversations.add_items(tenant, request.path_params["id"], body)
    page = ListPage(MAX_NEW_ITEMS)
    return json_response(to_list([item.to_json() for item in added], page))


@router.get("/v1/conversations/{id}/items")
async def list_items(
    request: Request, conversations: ConversationEndpoints, tenant: CountedTenant
) -> Response:
    """Return the items of a conversation, the newest first."""
    page = page_of(request.query_params, most=_MAX_ITEMS, usual=_USUAL_ITEMS)
    items = await conversations.items(tenant, request.path_params["id"], page.one_more())
    return json_response(to_list([item.to_json() for item in items], page))


@router.get("/v1/conversations/{id}/items/{item_id}")
async def get_item(
    request: Request, conversations: ConversationEndpoints, tenant: CountedTenant
) -> Response:
    """Return an item of a conversation."""
    parameters = request.path_params
    item = await conversations.item(tenant, parameters["id"], parameters["item_id"])
    return json_response(item.to_json())


@router.delete("/v1/conversations/{id}/items/{item_id}")
async def delete_item(
    request: Request, conversations: ConversationEndpoints, tenant: CountedTenant
) -> Response:
    """Delete an item for good, and return its conversation."""
    parameters = request.path_params
    found = await conversations.delete_item(tenant, parameters["id"], parameters["item_id"])
    return json_response(found.to_json())
