"""The endpoints that carry a prompt: one handler that shows every step of a request in order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Any

from service.errors import RateLimitExceededError
from service.gateway.admission import Admission, Entry
from service.gateway.cache.response_cache import ResponseCache
from service.gateway.dispatch.recipe_executor import RecipeExecutor
from service.gateway.request.parsing import InferenceRequest
from service.gateway.request.request_intake import RequestIntake
from service.gateway.request_scope import RequestObservers, RequestScope
from service.gateway.response_send import ResponseSend
from service.gateway.routing.candidate_planner import CandidatePlanner
from service.gateway.routing.route_plan import RoutePlan
from service.gateway.routing.session_affinity import SessionService
from service.gateway.shadow.evaluator import ShadowEvaluator
from service.gateway.stored_response_send import ResponseKeeper
from service.http.asgi_helpers import ClientDisconnectedError, Receive, Send, until_gone
from service.http.error_formats import dialect_of
from service.http.on_behalf import on_behalf

# With this header Ray Serve does not cancel the request when its client leaves. HAProxy sets it.
_SERVE_IGNORES_DISCONNECTS = b"x-request-disconnect-disabled"


class InferenceHandler:
    """Answers requests that carry a prompt.

    Args:
        intake: Reads, checks and parses requests, and runs the tenant's guard.
        planner: Finds the candidates for a request, and what is expected of each.
        cache: The response cache.
        admission: Reserves what a request may use, and settles it.
        executor: Chooses among the candidates and runs the choice.
        sessions: Finds and records the sessions of conversations.
        shadow: Lets other experts answer a share of the requests, too.
        keeper: Stores responses.
        observers: Metrics, traces, console and access log.
        behind_serve: Whether Ray Serve cancels a request whose client has left, unless a header
            tells it not to. Otherwise the handler watches for that itself.
    """

    def __init__(
        self,
        *,
        intake: RequestIntake,
        planner: CandidatePlanner,
        cache: ResponseCache,
        admission: Admission,
        executor: RecipeExecutor,
        sessions: SessionService,
        shadow: ShadowEvaluator,
        keeper: ResponseKeeper,
        observers: RequestObservers,
        behind_serve: bool,
    ) -> None:
        self._intake = intake
        self._planner = planner
        self._cache = cache
        self._admission = admission
        self._executor = executor
        self._sessions = sessions
        self._shadow = shadow
        self._keeper = keeper
        self._observers = observers
        self._behind_serve = behind_serve

    async def handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request. The steps run in the order of the lines."""
        # The scope also answers errors, in the client's dialect.
        async with RequestScope(self._observers, scope, send) as request_scope:
            record = request_scope.record
            headers = self._intake.headers(scope["headers"])
            # The request counts against request limits before its body is read. `_admit` reserves
            # tokens and cost later. The exit settles them.
            behalf = on_behalf(scope)
            async with self._admission.enter(headers, record, behalf) as entry:
                named = None if behalf is None else behalf.named
                validated = await self._intake.read(
                    record.path, headers, entry.tenant, receive, named
                )
                request = request_scope.add_request(validated)
                async with self._keeper.keeping(request, send) as kept:
                    session = await self._sessions.find(request)
                    plan = await self._planner.plan_by_all_stages(request, session)
                    request_scope.add_plan(plan, validated.arrived_s, time.monotonic())
                    watched = self._observers.aliases.watch(record, kept)
                    watched = self._sessions.watch(session, record, watched)
                    cached = await self._cache.begin(request, watched)
                    request_scope.headers += cached.headers
                    if cached.hit is not None:
                        record.expert = record.recipe = cached.hit.expert
                        record.status = 200
                        await cached.send_hit([*request_scope.headers, record.route_header])
                        return
                    plan = self._executor.within_bounds(request, plan)
                    plan = self._executor.affordable(request, plan)
                    send_answer, shadowed = self._shadow.watch(request, plan, cached.send)
                    # Admission may make the body ask for usage in every chunk, and may lower the
                    # answer's bound.
                    request, plan = await self._admit(entry, request, plan)
                    # Order of a message: UsageMeter, ResponseSend, shadow, answer cache, session,
                    # alias, stored response, server.
                    reply = ResponseSend(
                        send_answer,
                        request_scope.headers,
                        record,
                        entry.charged_meter,
                        dialect_of(record.path),
                    )
                    answering = self._executor.execute(request, plan, reply)
                    if self._behind_serve and _SERVE_IGNORES_DISCONNECTS not in headers:
                        await answering
                    else:
                        await until_gone(answering, receive, scope)
                    self._shadow.offer(shadowed, record)
                    await cached.store_answer(
                        by_own_bound=record.clipped is None and request.most_tokens is not None
                    )

    async def _admit(
        self, entry: Entry, request: InferenceRequest, plan: RoutePlan
    ) -> tuple[InferenceRequest, RoutePlan]:
        """Admit a request with every candidate; where a budget is short, with the cheapest only."""
        try:
            return await self._reserve(entry, request, plan), plan
        except RateLimitExceededError as error:
            if error.code != "insufficient_quota" or len(plan.rows) == 1:
                raise
            plan = self._executor.cheapest(plan)
            return await self._reserve(entry, request, plan), plan

    async def _reserve(
        self, entry: Entry, request: InferenceRequest, plan: RoutePlan
    ) -> InferenceRequest:
        return await self._admission.admit(
            entry,
            request,
            partial(self._executor.expert_sets, plan),
            partial(self._executor.likely_tokens, request, plan),
            partial(self._executor.most_shown, request, plan),
        )


class InferenceEndpoint:
    """The handler as a plain ASGI endpoint, which can be waited for until it is idle.

    It is a class, because Starlette wraps functions and leaves other callables alone.
    """

    def __init__(self, handler: InferenceHandler) -> None:
        self.handler = handler
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._in_flight += 1
        self._idle.clear()
        try:
            await self.handler.handle(scope, receive, send)
        except ClientDisconnectedError:
            return
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until no request is in flight."""
        await self._idle.wait()
