"""The gateway's HTTP side: every endpoint, as one ASGI application.

The endpoints that carry prompts are plain ASGI, because they carry every token;
the rest is FastAPI's. The only module that imports fastapi.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from service import __version__
from service.config import Config
from service.errors import (
    CoeError,
    InvalidRequestError,
    PoolUnavailableError,
    StoreUnavailableError,
    UnknownEndpointError,
    UnknownModelError,
)
from service.gateway.admission import Admission
from service.gateway.cache.response_cache import ResponseCache
from service.gateway.console.endpoints import console_routes
from service.gateway.console.event_stream import EventStream
from service.gateway.cross_origin import CrossOriginMiddleware, CrossOriginRules
from service.gateway.dispatch.dispatcher import Dispatcher
from service.gateway.dispatch.execution import RecipeExecutor
from service.gateway.guard.guard import Guard
from service.gateway.middleware import InternalErrorMiddleware
from service.gateway.openapi import describe
from service.gateway.path_hints import hint_for
from service.gateway.request.validation import RequestValidator
from service.gateway.request_record import RequestRecord
from service.gateway.request_scope import RequestObservers
from service.gateway.routes import models as catalog
from service.gateway.routes.admin import Reload, admin_routes, check_admin, shows_admin_key
from service.gateway.routes.feedback import read_vote
from service.gateway.routes.inference import InferenceHandler
from service.gateway.routes.keys_and_usage import AccountEndpoints
from service.gateway.routing.candidates import SemanticRouter
from service.gateway.state import GatewayState
from service.http.asgi import ClientDisconnectedError, Receive, Send, read_body, send_response
from service.http.endpoints import ENDPOINTS
from service.http.openai_errors import ErrorResponse, dialect_of, error_response
from service.rpc.client import PoolLink
from service.rpc.pool_directory import PoolDirectory
from service.telemetry import metrics as metric_table
from service.telemetry.exposition import CONTENT_TYPE, join

if TYPE_CHECKING:
    from service.telemetry.tracing import Traces

log = logging.getLogger("coe.api")

_VOTE_BYTES = 10_000


class Gateway:
    """Answers requests. `app()` is its ASGI application.

    `neighbours`: the metrics of the other gateways on this node, as texts.

    `state`: what it has counted and learned, by earlier configs too. `reload` puts the config's
    file in force anew, where somebody here keeps it.

    `admin_key`: without one there are no admin endpoints.

    `behind_serve`: Ray Serve's HTTP server is around it, which cancels a request
    whose client has left and puts x-request-id into the reply; elsewhere that is
    done here.
    """

    def __init__(
        self,
        config: Config,
        router: SemanticRouter,
        dispatcher: Dispatcher,
        admission: Admission,
        accounts: AccountEndpoints,
        answering: RecipeExecutor,
        directory: PoolDirectory,
        remote_states: Callable[[], dict[str, str | None]],
        neighbours: Callable[[], Awaitable[list[str]]],
        state: GatewayState,
        *,
        admin_key: str | None = None,
        reload: Reload | None = None,
        traces: Traces | None = None,
        behind_serve: bool = False,
        guard: Guard | None = None,
        cache: ResponseCache,
    ) -> None:
        self._config = config
        self._router = router
        self._dispatcher = dispatcher
        self._admission = admission
        self._accounts = accounts
        self._answering = answering
        self._directory = directory
        self._remote_states = remote_states
        self._behind_serve = behind_serve
        self._admin_key = admin_key
        self._reload = reload
        self._created_s = state.created_s
        self.metrics = state.metrics
        # Requests that this config answers.
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._validator = RequestValidator(config, guard or Guard(config), self.metrics.meter)
        self._neighbours = neighbours
        self._inference = InferenceHandler(
            validator=self._validator,
            router=router,
            cache=cache,
            admission=admission,
            executor=answering,
            observers=RequestObservers(
                self.metrics,
                state.recent,
                traces,
                access_log=config.server.access_log,
                sends_request_id=not behind_serve,
            ),
            behind_serve=behind_serve,
        )
        self.feed = EventStream(
            config,
            directory,
            dispatcher.views,
            remote_states,
            lambda: self.metrics.in_flight,
            state.recent,
            dispatcher.budget_prices.prices,
            state.history,
        )

    async def idle(self) -> None:
        """Wait until no request is under way that came to this one."""
        await self._idle.wait()

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self._in_flight += 1
        self._idle.clear()
        try:
            await self._inference.handle(scope, receive, send)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    # --- endpoints

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
            app.router.routes.append(Route(path, _Endpoint(self._answer), methods=["POST"]))

        @app.get("/health")
        async def health() -> Response:
            return _json({"status": "ok"})

        @app.get("/ready")
        async def ready(request: Request) -> Response:
            experts = self._states()
            answering = [name for name, state in experts.items() if state["state"] == "device"]
            # Where every pool is scaled to zero, experts come when they are asked for.
            asleep = all(pool.min_replicas == 0 for pool in self._config.pools.values())
            up = bool(answering) or (asleep and bool(self._config.pools))
            body: dict[str, Any] = {"ready": up}
            if self._is_admin(dict(request.scope["headers"])):
                # Names and reasons are no stranger's business, nor every key's.
                body["experts"] = experts
            return _json(body, status_code=200 if up else 503)

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            headers = dict(request.scope["headers"])
            tenant = self._admission.identify(headers)
            states = catalog.for_clients(self._states())
            return _json(catalog.listing(self._config, states, self._created_s, tenant))

        @app.get("/v1/models/{name:path}")
        async def model(request: Request, name: str) -> Response:
            tenant = self._admission.identify(dict(request.scope["headers"]))
            if not name:
                raise UnknownEndpointError("there is no /v1/models/; did you mean /v1/models?")
            states = catalog.for_clients(self._states())
            entry = catalog.entry(self._config, states, self._created_s, name, tenant)
            if entry is None:
                raise UnknownModelError(f"the model {name[:128]!r} does not exist", param="model")
            return _json(entry)

        @app.post("/v1/route")
        async def route(request: Request) -> Response:
            headers = self._validator.headers(request.scope["headers"])
            async with self._admission.enter(headers, RequestRecord()) as entry:
                validated = await self._validator.validate(
                    "/v1/chat/completions", headers, entry.tenant, request.receive
                )
                parsed = validated.request
                plan = self._router.plan(parsed)
                told = self._answering.explain(parsed, plan)
                entry.record.status = 200
            return _json({**told, "guard": validated.explained()})

        if self._answering.feedback.enabled:

            @app.post("/v1/feedback")
            async def feedback(request: Request) -> Response:
                headers = dict(request.scope["headers"])
                tenant = await self._admission.look_up(headers)
                raw = await read_body(
                    request.receive,
                    _VOTE_BYTES,
                    declared=headers.get(b"content-length", b""),
                    timeout_s=self._config.server.limits.body_timeout_s,
                )
                return _json(await self._answering.feedback.vote(tenant, read_vote(raw)))

        @app.get("/metrics")
        async def metrics(request: Request) -> Response:
            self._check_watcher(dict(request.scope["headers"]), "/metrics")
            return PlainTextResponse(await self._metrics_text(), media_type=CONTENT_TYPE)

        @app.get("/openapi.json")
        async def openapi() -> Response:
            return _json(describe(self._config, named=self._keyless()))

        app.router.routes.extend(self._accounts.routes(self._admin_key))
        app.router.routes.extend(
            console_routes(self.feed, self._may_watch, behind_serve=self._behind_serve)
        )
        if self._admin_key is not None:
            app.router.routes.extend(
                admin_routes(self._directory, self._admin_key, lambda: self._reload)
            )

        for one in app.router.routes:
            # Whoever answers GET answers HEAD: the server sends the head of the reply only.
            if isinstance(one, Route) and "GET" in (one.methods or ()):
                one.methods = {*(one.methods or ()), "HEAD"}
        app.add_middleware(InternalErrorMiddleware)
        server = self._config.server
        app.add_middleware(
            CrossOriginMiddleware,
            rules=CrossOriginRules(server.host, server.allowed_hosts, server.cors_origins),
            keyless=self._keyless,
            refuse=self._refuse,
        )
        if server.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=server.cors_origins,
                allow_methods=("GET", "HEAD", "POST"),
                allow_headers=("*",),
                expose_headers=("*",),
                allow_private_network=True,
            )
        paths = [one.path for one in app.router.routes if isinstance(one, Route)]

        @app.exception_handler(CoeError)
        async def known(request: Request, error: CoeError) -> Response:
            return _response(error_response(error, dialect_of(request.scope["path"])))

        @app.exception_handler(HTTPException)
        async def http(request: Request, error: HTTPException) -> Response:
            # Not `request.url`: a query that is no UTF-8 would be our failure then.
            path = str(request.scope["path"])[:128]
            if error.status_code == 405:
                allowed = (error.headers or {}).get("Allow", "another method")
                wrong: CoeError = InvalidRequestError(
                    f"{path} takes {allowed}, not {request.method}"
                )
                fault = error_response(wrong, dialect_of(path))
                return _response(fault, status=405, headers=error.headers)
            missing = UnknownEndpointError(f"there is no {path}{hint_for(path, paths)}")
            return _response(error_response(missing, dialect_of(path)))

        return app

    def _keyless(self) -> bool:
        """Whether requests are answered without a key. While that is not known, none is."""
        try:
            return not self._admission.authenticator.needed
        except StoreUnavailableError:
            return False

    async def _refuse(self, path: str, error: CoeError, send: Send) -> None:
        """Answer a request that goes no further."""
        self.metrics.meter.add(metric_table.REQUESTS_REJECTED, 1, error.code)
        fault = error_response(error, dialect_of(path))
        await send_response(send, fault.status, fault.headers, fault.body)

    def _may_watch(self, headers: dict[bytes, bytes]) -> None:
        self._check_watcher(headers, "the console's events")

    def _check_watcher(self, headers: dict[bytes, bytes], what: str) -> None:
        """Where keys are asked for, everybody's traffic is the admin's to see. Raises CoeError."""
        if self._admission.authenticator.needed:
            check_admin(headers, self._admin_key, what)

    def _is_admin(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request may see everything: it shows the admin key, or no key is needed."""
        return self._keyless() or shows_admin_key(headers, self._admin_key)

    def _states(self) -> dict[str, dict[str, Any]]:
        views = self._dispatcher.views()
        return catalog.states(self._config, views, self._remote_states())

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
    except PoolUnavailableError:
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
        except ClientDisconnectedError:
            return


def _json(body: dict[str, Any], *, status_code: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code, media_type="application/json")


def _response(fault: ErrorResponse, *, status: int | None = None, headers: Any = None) -> Response:
    response = Response(fault.body, status_code=status or fault.status)
    for name, value in fault.headers:
        response.headers[name.decode()] = value.decode()
    for name, value in (headers or {}).items():
        response.headers[name] = value
    return response
