"""The scope of one request: it accounts for the request however it ends, and answers its errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from service.engine.engine_interface import Send
from service.errors import CoeError
from service.gateway.request_record import Headers, RequestRecord
from service.http.asgi_helpers import ClientDisconnectedError, send_response
from service.http.error_formats import dialect_of, error_response
from service.rpc.call_headers import trace_of
from service.telemetry.json_logging import log_fields

if TYPE_CHECKING:
    from service.gateway.console.request_history import RequestHistory
    from service.gateway.guard.guard import GuardResult
    from service.gateway.request.parsing import InferenceRequest
    from service.gateway.request_metrics import GatewayMetrics
    from service.gateway.routing.alias_traffic import AliasTraffic
    from service.gateway.routing.route_plan import RoutePlan
    from service.telemetry.tracing import Traces

log = logging.getLogger("coe.api")
access = logging.getLogger("coe.access")


@dataclass(frozen=True, slots=True)
class RequestObservers:
    """Where every request is reported.

    Attributes:
        metrics: The gateway's metrics.
        history: The console's list of requests.
        aliases: Counts requests by aliases.
        traces: Records traces; None where requests are not traced.
        access_log: Whether each request gets a log line, without its prompt.
        sends_request_id: Whether the gateway puts `x-request-id` into replies.
    """

    metrics: GatewayMetrics
    history: RequestHistory
    aliases: AliasTraffic
    traces: Traces | None
    access_log: bool
    sends_request_id: bool


class RequestScope:
    """Owns the record of one request, accounts for it however it ends, and answers its errors.

    As a context manager it answers a `CoeError` in the client's dialect and any other exception
    with 500, and lets cancellation through.

    Args:
        observers: Where the request is reported.
        scope: The request's ASGI scope.
        send: The server's ASGI `send`.
    """

    def __init__(
        self, observers: RequestObservers, scope: MutableMapping[str, Any], send: Send
    ) -> None:
        self.record = RequestRecord(path=scope["path"])
        self.headers: Headers = []
        self._observers = observers
        self._asgi = scope
        self._send = send

    async def __aenter__(self) -> RequestScope:
        record = self.record
        self._observers.metrics.request_started()
        if (traces := self._observers.traces) is not None:
            parent = trace_of(dict(self._asgi["headers"]))
            record.trace = traces.begin(parent, record.path, record.arrived_s)
            log_fields(trace_id=record.trace.trace_id)
        return self

    def add_request(self, validated: GuardResult) -> InferenceRequest:
        """Record the request once it is validated."""
        request, record = validated.request, self.record
        record.client_id, record.model = request.client_id, request.model
        record.alias, record.tenant = request.alias, request.tenant.name
        record.streamed, record.own_deadline = request.stream, request.own_deadline
        log_fields(request_id=request.client_id)
        if record.trace is not None:
            record.trace.set_request(
                request.request_id, request.model, request.stream, request.data
            )
        self.headers += self._id_header() + validated.headers
        if request.alias is not None:
            self.headers.append(request.alias.header)
        if request.left_out:
            self.headers.append((b"x-coe-tools-left-out", ", ".join(request.left_out).encode()))
        return request

    def add_plan(self, plan: RoutePlan, began_s: float, ended_s: float) -> RoutePlan:
        """Record the candidates, which were found between two times of `time.monotonic`."""
        record = self.record
        record.routed = True
        record.category, record.confidence = plan.category, plan.confidence
        record.topics = plan.topics
        record.route_ms = (ended_s - began_s) * 1000
        if record.trace is not None:
            record.trace.routed(plan.category, plan.confidence, began_s, ended_s - began_s)
        if plan.category:
            self.headers.append((b"x-coe-category", plan.category.encode()))
            self.headers.append((b"x-coe-confidence", f"{plan.confidence:.3f}".encode()))
        if plan.stage:
            self.headers.append((b"x-coe-router-stage", plan.stage.encode()))
        return plan

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        record = self.record
        try:
            if error is None:
                return True
            if isinstance(error, (ClientDisconnectedError, asyncio.CancelledError)):
                record.outcome = "client_gone"
                return False
            if isinstance(error, CoeError):
                await self._send_error(error)
                return True
            if isinstance(error, Exception):
                log.error("unhandled exception in the inference handler", exc_info=error)
                await self._send_error(
                    CoeError("internal error; the log holds its type and traceback")
                )
                return True
            return False
        finally:
            self._account()

    async def _send_error(self, error: CoeError) -> None:
        record = self.record
        record.outcome = record.fault = error.code
        if record.status:
            # The reply has begun and is not a stream, so it can only be cut short.
            raise ConnectionResetError(error.code)
        response = error_response(error, dialect_of(record.path))
        record.status = response.status
        headers = [*response.headers, *self._id_header()]
        await send_response(self._send, response.status, headers, response.body)

    def _id_header(self) -> Headers:
        if not self._observers.sends_request_id:
            return []
        return [(b"x-request-id", self.record.client_id.encode())]

    def _account(self) -> None:
        record, observers = self.record, self._observers
        record.finish()
        observers.metrics.request_finished(record)
        observers.aliases.finished(record)
        if record.trace is not None:
            record.trace.end(
                _span_attributes(record), "" if record.outcome == "ok" else record.outcome
            )
        if record.routed:
            observers.history.add_record(record)
        if observers.access_log:
            access.info("request", extra=_access_fields(record))


def _span_attributes(record: RequestRecord) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "http.response.status_code": record.status,
        "gen_ai.response.model": record.expert,
        "coe.recipe": record.recipe_label,
    }
    if any(call.prompt_tokens or call.completion_tokens for call in record.calls):
        # The sums cover all calls; a stream without usage has none.
        attributes["gen_ai.usage.input_tokens"] = sum(c.prompt_tokens or 0 for c in record.calls)
        attributes["gen_ai.usage.output_tokens"] = sum(
            call.completion_tokens or 0 for call in record.calls
        )
        attributes["coe.cost"] = record.cost
    if record.streamed and record.first_byte_s:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_byte_s
    return attributes


def _access_fields(record: RequestRecord) -> dict[str, Any]:
    return {
        "request_id": record.client_id,
        "path": record.path,
        "status": record.status,
        "expert": record.expert,
        "category": record.category,
        "ms": round(record.total_s * 1000, 1),
        "outcome": record.outcome,
    }
