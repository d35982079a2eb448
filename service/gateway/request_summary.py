"""What is told of a request once it has ended, to metrics and traces."""

from __future__ import annotations

import time

from service.gateway.request_record import RequestRecord
from service.http.openai_errors import codes_of_ours
from service.telemetry.gateway_metrics import ActiveCall, RequestSummary


def ended(
    passage: RequestRecord, *, category: str, streamed: bool, fault: str, began_s: float
) -> RequestSummary:
    """As it is now. `fault`: the error's code, or empty; `began_s`: by `time.monotonic`."""
    outcome = passage.outcome
    if outcome == "ok" and passage.status >= 400:
        outcome = "client_error" if passage.status < 500 else "server_error"
    return RequestSummary(
        expert=passage.expert,
        category=category,
        recipe="single" if passage.recipe == passage.expert else passage.recipe,
        outcome=outcome,
        fault=fault,
        attempts=passage.attempts,
        streamed=streamed,
        ours=passage.status >= 500 or outcome in codes_of_ours(),
        local=passage.local,
        first_byte_s=max(0.0, passage.first_byte_at_s - began_s),
        total_s=time.monotonic() - began_s,
        queue_s=passage.queue_ms / 1000,
        engine_s=passage.prefill_ms / 1000,
        predicted_s=passage.predicted_s,
        predicted_cost=passage.predicted_cost,
        escalations=passage.escalations,
        failed=passage.failed,
        calls=[
            ActiveCall(call.expert, call.prompt_tokens or 0, call.completion_tokens or 0, call.cost)
            for call in passage.calls
        ],
    )
