"""`POST /v1/route`: the decision for a chat completion, without running it."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.gateway.dependencies import Services, json_response
from service.gateway.request_record import RequestRecord

router = APIRouter()


@router.post("/v1/route")
async def route(request: Request, services: Services) -> Response:
    """Explain which candidate would answer this chat completion, and why."""
    headers = services.intake.headers(request.scope["headers"])
    async with services.admission.enter(headers, RequestRecord()) as entry:
        validated = await services.intake.read(
            "/v1/chat/completions", headers, entry.tenant, request.receive
        )
        session = await services.sessions.find(validated.request)
        plan = await services.planner.plan_by_all_stages(validated.request, session)
        left_out = services.planner.left_out(validated.request, plan)
        decision = services.executor.explain(validated.request, plan, left_out)
        entry.record.status = 200
    return json_response({**decision, "guard": validated.explained()})
