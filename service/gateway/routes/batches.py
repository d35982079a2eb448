"""`/v1/batches`: clients create, list, watch and cancel batches of requests."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from service.errors import InvalidRequestError
from service.gateway.dependencies import (
    BatchEndpoints,
    CountedTenant,
    Services,
    headers_of,
    json_response,
)
from service.gateway.list_pages import page_of, to_list
from service.http.asgi_helpers import read_body

router = APIRouter()

_MAX_BODY_BYTES = 64 * 1024
_MAX_BATCHES = 100
_USUAL_BATCHES = 20


@router.post("/v1/batches")
async def create_batch(
    request: Request, services: Services, batches: BatchEndpoints, tenant: CountedTenant
) -> Response:
    """Create a batch from a file of requests."""
    raw = await read_body(
        request.receive,
        _MAX_BODY_BYTES,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    batch = await batches.create(tenant, body)
    return json_response(batches.to_json(batch))


@router.get("/v1/batches")
async def list_batches(
    request: Request, batches: BatchEndpoints, tenant: CountedTenant
) -> Response:
    """Return the tenant's batches, the newest first."""
    page = page_of(request.query_params, most=_MAX_BATCHES, usual=_USUAL_BATCHES)
    found = await batches.batches(tenant, page.one_more())
    return json_response(to_list([batches.to_json(batch) for batch in found], page))


@router.get("/v1/batches/{id}")
async def get_batch(request: Request, batches: BatchEndpoints, tenant: CountedTenant) -> Response:
    """Return a batch."""
    batch = await batches.batch(tenant, request.path_params["id"])
    return json_response(batches.to_json(batch))


@router.post("/v1/batches/{id}/cancel")
async def cancel_batch(
    request: Request, batches: BatchEndpoints, tenant: CountedTenant
) -> Response:
    """Cancel a batch; its output files get what is there."""
    batch = await batches.cancel(tenant, request.path_params["id"])
    return json_response(batches.to_json(batch))
