"""`GET /openapi.json`."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.gateway.dependencies import Services, json_response
from service.gateway.openapi import describe

router = APIRouter()


@router.get("/openapi.json")
async def openapi(services: Services) -> Response:
    """Return the OpenAPI description; it names experts only while no key is needed."""
    return json_response(describe(services.config, named=services.keyless()))
