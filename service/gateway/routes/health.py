"""`GET /health` and `GET /ready`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from service.gateway.dependencies import Services, headers_of, json_response
from service.gateway.routes.models import expert_states

router = APIRouter()


@router.get("/health")
async def health() -> Response:
    """Tell that the gateway runs."""
    return json_response({"status": "ok"})


@router.get("/ready")
async def ready(request: Request, services: Services) -> Response:
    """Tell whether any expert answers, with 200 or 503."""
    pools = services.config.pools
    experts = expert_states(services.config, services.views(), services.remote_failures())
    # An expert that gave its memory back answers the next request.
    answering = any(
        state["state"] == "device" or state.get("released", False) for state in experts.values()
    )
    # Where every pool is scaled to zero, the first request starts one.
    scaled_to_zero = bool(pools) and all(pool.min_replicas == 0 for pool in pools.values())
    is_ready = answering or scaled_to_zero
    body: dict[str, Any] = {"ready": is_ready}
    if services.is_operator(headers_of(request)):
        # Only the operator may read names of experts and reasons of failures.
        body["experts"] = experts
    return json_response(body, 200 if is_ready else 503)
