"""`/v1/batches`: clients create, list, watch and cancel batches of requests."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.gateway.dependencies import (
    BatchEndpoints,
    CountedTenant,
    Services,
    json_object,
    json_response,
)
from service.gateway.list_pages import page_of, to_list

router = APIRouter()

_MAX_BODY_BYTES = 64 * 1024
_MAX_BATCHES = 100
_USUAL_BATCHES = 20


@router.post("/v1/batches")
async def create_batch(
    request: Request, services: Services, batches: BatchEndpoints, tenant: CountedTenant
) -> Response:
    """Create a batch from a file of requests."""
    body = await json_object(request, services, _MAX_BODY_BYTES)
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
