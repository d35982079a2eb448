"""A request that carries a prompt, from its first byte to its last: every step in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

from service.errors import CoeError, RateLimitExceededError
from service.gateway import request_summary
from service.gateway.admission import Admission, Entry
from service.gateway.cache.response_cache import ResponseCache
from service.gateway.console.request_history import RequestHistory, account
from service.gateway.dispatch.execution import RecipeExecutor
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.validation import RequestValidator
from service.gateway.request_record import RequestRecord
from service.gateway.routing.candidates import RoutePlan, SemanticRouter
from service.http.asgi import ClientDisconnectedError, Message, Receive, Send, until_gone
from service.http.openai_errors import dialect_of, error_response
from service.rpc.call import trace_of
from service.telemetry.gateway_metrics import GatewayMetrics
from service.telemetry.logging import log_fields

if TYPE_CHECKING:
    from service.telemetry.tracing import Traces

log = logging.getLogger("coe.api")
access = logging.getLogger("coe.access")


class InferenceHandler:
    """Reads, plans, admits, answers and accounts for requests. See `Gateway` for `behind_serve`.

    `access_log`: one line of each request, without its prompt.
    """

    def __init__(
        self,
        *,
        intake: RequestValidator,
        router: SemanticRouter,
        cache: ResponseCache,
        admission: Admission,
        answering: RecipeExecutor,
        metrics: GatewayMetrics,
        recent: RequestHistory,
        traces: Traces | None,
        behind_serve: bool,
        access_log: bool,
    ) -> None:
        self._intake = intake
        self._router = router
        self._cache = cache
        self._admission = admission
        self._answering = answering
        self._metrics = metrics
        self._recent = recent
        self._traces = traces
        self._behind_serve = behind_serve
        self._access_log = access_log

    async def handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request to an endpoint that carries a prompt."""
        began_s = time.monotonic()
        passage = RequestRecord()
        plan: RoutePlan | None = None
        category = ""
        client_id = ""
        self._metrics.began()
        streamed = False
        fault = ""
        try:
            if self._traces is not None:
                given = trace_of(dict(scope["headers"]))
                passage.trace = self._traces.begin(given, scope["path"], began_s)
                log_fields(trace_id=passage.trace.trace_id)
            headers = self._intake.headers(scope["headers"])
            async with self._admission.enter(headers, passage) as entry:
                verdict = await self._intake.validate(scope["path"], headers, entry.tenant, receive)
                asked = verdict.asked
                client_id = asked.client_id
                log_fields(request_id=client_id)
                streamed = asked.stream
                passage.own_deadline = asked.own_deadline
                plan = self._router.plan(asked)
                category = plan.category
                understood_s = time.monotonic()
                passage.route_ms = (understood_s - verdict.arrived_s) * 1000
                if passage.trace is not None:
                    passage.trace.asked(asked.request_id, asked.model, streamed, asked.data)
                    route_s = passage.route_ms / 1000
                    passage.trace.routed(category, plan.confidence, verdict.arrived_s, route_s)
                told = _headers(plan) + self._id_header(client_id) + verdict.headers
                if asked.left_out:
                    told.append((b"x-coe-tools-left-out", ", ".join(asked.left_out).encode()))
                visit = await self._cache.begin(asked, send)
                told += visit.headers
                if visit.hit is not None:
                    passage.expert = passage.recipe = visit.hit.expert
                    passage.status = 200
                    await visit.send_hit([*told, passage.route_header])
                    return
                plan = self._answering.affordable(asked, plan)
                asked, plan = await self._admitted(entry, asked, plan)
                answered = self._answering.execute(
                    asked, plan, told, visit.send, passage, began_s, entry.counting
                )
                if self._behind_serve and not _keeps_on(scope["headers"]):
                    await answered
                else:
                    await until_gone(answered, receive)
                await visit.store_answer(
                    by_own_bound=passage.clipped is None and asked.most_tokens is not None
                )
        except CoeError as error:
            passage.outcome = fault = error.code
            await self._fail(error, scope["path"], client_id, passage, send)
        except (ClientDisconnectedError, asyncio.CancelledError):
            passage.outcome = "client_gone"
            raise
        except Exception:
            passage.outcome = fault = CoeError.code
            log.exception("a request failed unexpectedly")
            unknown = CoeError("something went wrong here; the log has its kind and place")
            await self._fail(unknown, scope["path"], client_id, passage, send)
        finally:
            ended = request_summary.ended(
                passage,
                category=category,
                streamed=streamed,
                fault=fault,
                began_s=began_s,
            )
            self._metrics.ended(ended)
            if plan is not None:
                self._metrics.routed(passage.route_ms / 1000)
            if passage.trace is not None:
                passage.trace.ended(ended, passage.status)
            if plan is not None:
                self._recent.note(
                    account(
                        ended,
                        client_id,
                        asked.model,
                        plan.confidence,
                        passage.route_ms / 1000,
                        passage,
                    )
                )
            if self._access_log:
                fields = {
                    "request_id": client_id,
                    "path": scope["path"],
                    "status": passage.status,
                    "expert": passage.expert,
                    "category": category,
                    "ms": round((time.monotonic() - began_s) * 1000, 1),
                    "outcome": passage.outcome,
                }
                access.info("request", extra=fields)

    async def _admitted(
        self, entry: Entry, asked: InferenceRequest, plan: RoutePlan
    ) -> tuple[InferenceRequest, RoutePlan]:
        """Admit a request with all that its plan may ask; where a budget has not enough left for
        that, with the cheapest only."""
        try:
            return await self._admit(entry, asked, plan), plan
        except RateLimitExceededError as error:
            if error.code != "insufficient_quota" or len(plan.rows) == 1:
                raise
            plan = self._answering.cheapest(plan)
            return await self._admit(entry, asked, plan), plan

    async def _admit(
        self, entry: Entry, asked: InferenceRequest, plan: RoutePlan
    ) -> InferenceRequest:
        answering = self._answering
        return await self._admission.admit(
            entry, asked, answering.ways(plan), partial(answering.likely_tokens, asked, plan)
        )

    async def _fail(
        self, error: CoeError, path: str, client_id: str, passage: RequestRecord, send: Send
    ) -> None:
        if passage.status:
            # The reply has begun and is no stream: cutting it short is all that is left.
            raise ConnectionResetError(error.code)
        fault = error_response(error, dialect_of(path))
        passage.status = fault.status
        head: Message = {
            "type": "http.response.start",
            "status": fault.status,
            "headers": [*fault.headers, *self._id_header(client_id)],
        }
        await send(head)
        await send({"type": "http.response.body", "body": fault.body})

    def _id_header(self, client_id: str) -> list[tuple[bytes, bytes]]:
        return [] if self._behind_serve else [(b"x-request-id", client_id.encode())]


def _keeps_on(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether Serve was told not to notice when the client leaves: then it is done here.

    HAProxy takes that header out, but a gateway's own port can be reached without it.
    """
    return any(name == b"x-request-disconnect-disabled" for name, _ in headers)


def _headers(plan: RoutePlan) -> list[tuple[bytes, bytes]]:
    headers = []
    if plan.category:
        headers.append((b"x-coe-category", plan.category.encode()))
        headers.append((b"x-coe-confidence", f"{plan.confidence:.3f}".encode()))
    return headers
