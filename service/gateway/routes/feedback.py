"""`POST /v1/feedback`: a score for a reply."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.gateway.dependencies import CountedTenant, Services, headers_of, json_response
from service.gateway.routing.feedback_learning import read_vote
from service.http.asgi_helpers import read_body

router = APIRouter()

_MAX_BODY_BYTES = 10_000


@router.post("/v1/feedback")
async def feedback(request: Request, services: Services, tenant: CountedTenant) -> Response:
    """Count a vote on a reply of this tenant."""
    raw = await read_body(
        request.receive,
        _MAX_BODY_BYTES,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    return json_response(await services.feedback.vote(tenant, read_vote(raw)))
