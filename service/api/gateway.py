"""The gateway's HTTP side: every endpoint, as one ASGI application.

The endpoints that carry prompts are plain ASGI, because they carry every token;
the rest is FastAPI's. The only module that imports fastapi.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from service import __version__
from service.api import catalog, ending
from service.api.accounts import Accounts
from service.api.admission import Admission, Admitted
from service.api.answering import Answering
from service.api.body import ENDPOINTS, Asked
from service.api.cache import Cache
from service.api.console.endpoints import console_routes
from service.api.console.feed import Feed
from service.api.console.recent import Recent, account
from service.api.feedback import read_vote
from service.api.guard.guard import Guard
from service.api.intake import Intake
from service.api.passage import Passage
from service.api.plan import Plan, Router
from service.api.relay import Relay
from service.api.schemas import describe
from service.config import Config
from service.errors import (
    CoeError,
    ConfigError,
    Conflict,
    InvalidRequest,
    PoolGone,
    TooMany,
    Unauthorized,
    UnknownEndpoint,
    UnknownModel,
)
from service.link.asgi import ClientGone, Message, Receive, Send, read_body, until_gone
from service.link.call import trace_of
from service.link.client import PoolLink
from service.link.directory import Directory
from service.link.faults import Fault, fault_of
from service.link.secret import same
from service.telemetry import table
from service.telemetry.exposition import CONTENT_TYPE, join
from service.telemetry.logs import log_fields
from service.telemetry.metrics import GatewayMetrics

if TYPE_CHECKING:
    from service.telemetry.traces import Traces

log = logging.getLogger("coe.api")
access = logging.getLogger("coe.access")

_VOTE_BYTES = 10_000


class Gateway:
    """Answers requests. `app()` is its ASGI application.

    `neighbours`: the metrics of the other gateways on this node, as texts.

    `admin_key`: without one there are no admin endpoints.

    `behind_serve`: Ray Serve's HTTP server is around it, which cancels a request
    whose client has left and puts x-request-id into the reply; elsewhere that is
    done here.
    """

    def __init__(
        self,
        config: Config,
        router: Router,
        relay: Relay,
        admission: Admission,
        accounts: Accounts,
        answering: Answering,
        directory: Directory,
        remote_states: Callable[[], dict[str, str | None]],
        neighbours: Callable[[], Awaitable[list[str]]],
        *,
        admin_key: str | None = None,
        traces: Traces | None = None,
        behind_serve: bool = False,
        guard: Guard | None = None,
        cache: Cache,
    ) -> None:
        self._config = config
        self._router = router
        self._relay = relay
        self._admission = admission
        self._accounts = accounts
        self._answering = answering
        self._directory = directory
        self._remote_states = remote_states
        self._behind_serve = behind_serve
        self._admin_key = admin_key
        # Puts the config's file in force anew, where somebody here keeps it.
        self.reload: Callable[[], Awaitable[dict[str, list[str]]]] | None = None
        self._created_s = int(time.time())
        self.metrics = GatewayMetrics(name for name, e in config.experts.items() if e.remote)
        self._cache = cache
        cache.meter = self.metrics.meter
        self._intake = Intake(
            config, guard or Guard(config), admission.identify, self.metrics.meter
        )
        self.metrics.meter.on_read(self._read_pools)
        self._neighbours = neighbours
        self._traces = traces
        self._recent = Recent()
        self.feed = Feed(
            config,
            directory,
            relay.views,
            remote_states,
            lambda: self.metrics.in_flight,
            self._recent,
            relay.spending.prices,
        )

    # --- prompts

    async def answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One request to an endpoint that carries a prompt."""
        began_s = time.monotonic()
        passage = Passage()
        plan: Plan | None = None
        category = ""
        client_id = ""
        self.metrics.began()
        streamed = False
        fault = ""
        route_s = 0.0
        try:
            if self._traces is not None:
                given = trace_of(dict(scope["headers"]))
                passage.trace = self._traces.begin(given, scope["path"], began_s)
                log_fields(trace_id=passage.trace.trace_id)
            verdict = await self._intake.read(scope["path"], scope["headers"], receive)
            asked = verdict.asked
            client_id = asked.client_id
            log_fields(request_id=client_id)
            streamed = asked.stream
            plan = self._router.plan(asked)
            category = plan.category
            route_s = time.monotonic() - began_s
            self.metrics.routed(route_s)
            passage.route_ms = route_s * 1000
            if passage.trace is not None:
                passage.trace.asked(asked.request_id, asked.model, streamed, asked.data)
                passage.trace.routed(category, plan.confidence, began_s, route_s)
            told = _headers(plan, route_s) + self._id_header(client_id) + verdict.headers
            visit = await self._cache.begin(asked, send)
            told += visit.headers
            if visit.hit is not None:
                passage.expert = passage.recipe = visit.hit.expert
                passage.status = 200
                await visit.serve(told)
                return
            plan = self._answering.affordable(asked, plan)
            async with self._admitted(asked, plan, passage) as (admitted, plan):
                told += admitted.headers
                answered = self._answering.answer(
                    admitted.asked, plan, told, visit.send, passage, admitted.counting
                )
                if self._behind_serve:
                    await answered
                else:
                    await until_gone(answered, receive)
            await visit.keep()
        except CoeError as error:
            passage.outcome = fault = error.code
            await self._fail(error, client_id, passage, send)
        except (ClientGone, asyncio.CancelledError):
            passage.outcome = "client_gone"
            raise
        except Exception:
            passage.outcome = fault = CoeError.code
            log.exception("a request failed unexpectedly")
            unknown = CoeError("something went wrong here; the log has its kind and place")
            await self._fail(unknown, client_id, passage, send)
        finally:
            ended = ending.ended(
                passage,
                category=category,
                streamed=streamed,
                fault=fault,
                began_s=began_s,
            )
            self.metrics.ended(ended)
            if passage.trace is not None:
                passage.trace.ended(ended, passage.status)
            if plan is not None:
                self._recent.note(
                    account(ended, client_id, asked.model, plan.confidence, route_s, passage)
                )
            if self._config.server.access_log:
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

    @asynccontextmanager
    async def _admitted(
        self, asked: Asked, plan: Plan, passage: Passage
    ) -> AsyncIterator[tuple[Admitted, Plan]]:
        """Admit a request with all that its plan may ask; where a budget has not enough left for
        that, with the cheapest only."""
        async with AsyncExitStack() as stack:
            for tried in (plan, self._answering.cheapest(plan)):
                admission = self._admission.admit(
                    asked, self._answering.ways(tried), lambda: passage.expert
                )
                try:
                    admitted = await stack.enter_async_context(admission)
                except TooMany as error:
                    if tried is not plan or error.code != "insufficient_quota":
                        raise
                    continue
                yield admitted, tried
                return

    async def _fail(self, error: CoeError, client_id: str, passage: Passage, send: Send) -> None:
        if passage.status:
            # The reply has begun and is no stream: cutting it short is all that is left.
            raise ConnectionResetError(error.code)
        fault = fault_of(error)
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

    # --- everything else

    def app(self) -> FastAPI:
        """The ASGI application with every endpoint."""
        app = FastAPI(
            title="coe",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            redirect_slashes=False,
        )
        for path in ENDPOINTS:
            app.router.routes.append(Route(path, _Endpoint(self.answer), methods=["POST"]))

        @app.get("/health")
        async def health() -> Response:
            return _json({"status": "ok"})

        @app.get("/ready")
        async def ready() -> Response:
            experts = self._states()
            answering = [name for name, state in experts.items() if state["state"] == "device"]
            # Where every pool is scaled to zero, experts come when they are asked for.
            asleep = all(pool.min_replicas == 0 for pool in self._config.pools.values())
            up = bool(answering) or (asleep and bool(self._config.pools))
            body = {"ready": up, "experts": experts}
            return _json(body, status_code=200 if up else 503)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            self._admission.identify(dict(request.scope["headers"]))
            return _json(catalog.listing(self._config, self._states(), self._created_s))

        @app.get("/v1/models/{name:path}")
        async def model(request: Request, name: str) -> Response:
            self._admission.identify(dict(request.scope["headers"]))
            entry = catalog.entry(self._config, self._states(), self._created_s, name)
            if entry is None:
                raise UnknownModel(f"the model {name[:128]!r} does not exist", param="model")
            return _json(entry)

        @app.post("/v1/route")
        async def route(request: Request) -> Response:
            verdict = await self._intake.read(
                "/v1/chat/completions", request.scope["headers"], request.receive
            )
            asked = verdict.asked
            plan = self._router.plan(asked)
            told = self._answering.explain(asked, plan)
            return _json({**told, "guard": verdict.explained()})

        if self._answering.feedback.enabled:

            @app.post("/v1/feedback")
            async def feedback(request: Request) -> Response:
                headers = dict(request.scope["headers"])
                tenant = self._admission.identify(headers)
                raw = await read_body(request.receive, _VOTE_BYTES)
                return _json(await self._answering.feedback.vote(tenant, read_vote(raw)))

        @app.get("/metrics")
        async def metrics() -> Response:
            return PlainTextResponse(await self._metrics_text(), media_type=CONTENT_TYPE)

        @app.get("/openapi.json")
        async def openapi() -> Response:
            return _json(describe(self._config))

        app.router.routes.extend(self._accounts.routes(self._admin_key))
        app.router.routes.extend(
            console_routes(self.feed, self._may_watch, behind_serve=self._behind_serve)
        )
        if self._admin_key is not None:
            self._add_admin(app, self._admin_key)

        @app.exception_handler(CoeError)
        async def known(request: Request, error: CoeError) -> Response:
            return _response(fault_of(error))

        @app.exception_handler(HTTPException)
        async def http(request: Request, error: HTTPException) -> Response:
            # Not `request.url`: a query that is no UTF-8 would be our failure then.
            path = str(request.scope["path"])[:128]
            if error.status_code == 405:
                allowed = (error.headers or {}).get("Allow", "another method")
                wrong: CoeError = InvalidRequest(f"{path} takes {allowed}, not {request.method}")
                return _response(fault_of(wrong), status=405, headers=error.headers)
            return _response(fault_of(UnknownEndpoint(f"there is no {path}")))

        return app

    def _may_watch(self, headers: dict[bytes, bytes]) -> None:
        """Where keys are asked for, everybody's traffic is the admin's to see. Raises CoeError."""
        if not self._admission.keyring.needed:
            return
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if self._admin_key is None or not same(given, self._admin_key.encode()):
            raise Unauthorized("the console's events need the admin key as Bearer token")

    def _add_admin(self, app: FastAPI, key: str) -> None:
        def check(request: Request) -> None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not same(given.encode(), key.encode()):
                raise Unauthorized("the admin endpoints need the admin key as Bearer token")

        @app.get("/admin/experts")
        async def experts(request: Request) -> Response:
            check(request)
            links = self._directory.links()
            told = await asyncio.gather(*(link.experts() for link in links), return_exceptions=True)
            pools = {
                link.address.name: one
                for link, one in zip(links, told, strict=True)
                if isinstance(one, dict)
            }
            return _json({"pools": pools})

        @app.post("/admin/reload")
        async def reload(request: Request) -> Response:
            check(request)
            if self.reload is None:
                raise Conflict("this service's config is changed where it was deployed from")
            try:
                return _json(await self.reload())
            except ConfigError as error:
                raise Conflict(error.message) from None

        @app.post("/admin/experts/{name:path}/{act}")
        async def operate(request: Request, name: str, act: str) -> Response:
            check(request)
            links = [
                link
                for link in self._directory.links()
                if link.snapshot is not None and name in link.snapshot.experts
            ]
            if not links:
                raise UnknownModel(f"no running pool holds an expert {name[:128]!r}")
            answers = await asyncio.gather(*(link.operate(act, name) for link in links))
            for status, body in answers:
                if status >= 400:
                    return Response(body, status_code=status, media_type="application/json")
            return _json({"expert": name, "done": act, "pools": len(links)})

    def _states(self) -> dict[str, dict[str, Any]]:
        views = self._relay.views()
        return catalog.states(self._config, views, self._remote_states())

    def _read_pools(self) -> None:
        """What is known of pools, for the metrics."""
        meter = self.metrics.meter
        meter.put(table.POOLS, len(self._directory.links()))
        meter.forget(table.SNAPSHOT_AGE)
        for pool, age_s in self._directory.silences().items():
            meter.put(table.SNAPSHOT_AGE, age_s, pool)

    async def _metrics_text(self) -> str:
        """Of this process, of the node's other gateways, and of every pool."""
        links = self._directory.links()
        own = self.metrics.text({"gateway": self._directory.gateway})
        pools = asyncio.gather(*map(_told, links))
        first, neighbours, others = await asyncio.gather(own, self._neighbours(), pools)
        return await asyncio.to_thread(join, [first, *neighbours, *others])


async def _told(link: PoolLink) -> str:
    """A pool's metrics; nothing where it has just gone."""
    try:
        return await link.metrics()
    except PoolGone:
        return ""


class _Endpoint:
    """A plain ASGI endpoint: Starlette wraps functions, and leaves other callables alone."""

    def __init__(
        self,
        answer: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]],
    ) -> None:
        self._answer = answer

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except ClientGone:
            return


def _headers(plan: Plan, route_s: float) -> list[tuple[bytes, bytes]]:
    headers = [(b"x-coe-route-ms", f"{route_s * 1000:.2f}".encode())]
    if plan.category:
        headers.append((b"x-coe-category", plan.category.encode()))
        headers.append((b"x-coe-confidence", f"{plan.confidence:.3f}".encode()))
    return headers


def _json(body: dict[str, Any], *, status_code: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code, media_type="application/json")


def _response(fault: Fault, *, status: int | None = None, headers: Any = None) -> Response:
    response = Response(fault.body, status_code=status or fault.status)
    for name, value in fault.headers:
        response.headers[name.decode()] = value.decode()
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response
