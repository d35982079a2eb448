"""`/v1/responses/{id}`: clients read and delete stored responses."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.errors import InvalidRequestError
from service.gateway.dependencies import CountedTenant, StoredResponseEndpoints, json_response
from service.gateway.list_pages import page_of, to_list

router = APIRouter()

_MAX_ITEMS = 100
_USUAL_ITEMS = 20


@router.get("/v1/responses/{id}")
async def get_response(
    request: Request, responses: StoredResponseEndpoints, tenant: CountedTenant
) -> Response:
    """Return a response."""
    for name in ("stream", "starting_after"):
        if request.query_params.get(name) not in (None, "false"):
            raise InvalidRequestError(
                f"`{name}` is not supported: a response is stored once it has ended", param=name
            )
    found = await responses.response(tenant, request.path_params["id"])
    return json_response(found.to_json())


@router.delete("/v1/responses/{id}")
async def delete_response(
    request: Request, responses: StoredResponseEndpoints, tenant: CountedTenant
) -> Response:
    """Delete a response for good, with its items."""
    response_id = request.path_params["id"]
    await responses.delete(tenant, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post("/v1/responses/{id}/cancel")
async def cancel_response(
    request: Request, responses: StoredResponseEndpoints, tenant: CountedTenant
) -> Response:
    """Refuse to cancel a response: only those that run in the background could be."""
    await responses.response(tenant, request.path_params["id"])
    raise InvalidRequestError("only responses that run in the background can be cancelled")


@router.get("/v1/responses/{id}/input_items")
async def list_input_items(
    request: Request, responses: StoredResponseEndpoints, tenant: CountedTenant
) -> Response:
    """Return the items that a response was made from, earlier turns included; newest first."""
    page = page_of(request.query_params, most=_MAX_ITEMS, usual=_USUAL_ITEMS)
    items = await responses.input_items(tenant, request.path_params["id"], page.one_more())
    return json_response(to_list([item.to_json() for item in items], page))
