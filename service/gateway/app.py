"""The gateway's HTTP application: every endpoint, and the middleware around them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from service import __version__
from service.errors import CoeError, InvalidRequestError, UnknownEndpointError
from service.gateway.console.endpoints import console_routes
from service.gateway.console.event_stream import EventStream
from service.gateway.cross_site_guard import CrossOriginMiddleware, CrossOriginRules
from service.gateway.dependencies import GatewayServices
from service.gateway.routes import (
    added_experts,
    admin,
    batch_plan,
    batches,
    conversations,
    feedback,
    files,
    health,
    keys,
    metrics,
    models,
    ollama,
    openapi,
    route,
    stored_responses,
    usage,
)
from service.gateway.routes.inference import InferenceEndpoint
from service.gateway.unknown_path_hints import hint_for
from service.http.asgi_helpers import Message, Receive, Send, send_response
from service.http.error_formats import Dialect, ErrorResponse, dialect_of, error_response
from service.http.prompt_endpoints import ENDPOINTS, OLLAMA_ENDPOINTS
from service.telemetry.metric_declarations import REQUESTS_REJECTED

log = logging.getLogger("coe.api")

App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# These endpoints handle their own exceptions, and every token passes through them.
_INFERENCE = frozenset(ENDPOINTS)


def build_app(
    services: GatewayServices,
    inference: InferenceEndpoint,
    events: EventStream,
    *,
    behind_serve: bool,
) -> App:
    """Build the ASGI application for one config.

    Args:
        services: The services that the endpoints use.
        inference: Answers requests that carry a prompt. It is plain ASGI, because every token
            passes through it.
        events: The console's stream of events.
        behind_serve: Whether Ray Serve's HTTP server is around the application. It cancels a
            request whose client has left, and puts `x-request-id` into replies.
    """
    app = FastAPI(
        title="coe",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    for path in ENDPOINTS:
        app.router.routes.append(Route(path, inference, methods=["POST"]))
    for path in OLLAMA_ENDPOINTS:
        face = ollama.OllamaEndpoint(path, services, inference)
        app.router.routes.append(Route(path, face, methods=["POST"]))
    app.include_router(ollama.router)
    app.include_router(health.router)
    app.include_router(models.router)
    app.include_router(route.router)
    if services.feedback.enabled:
        app.include_router(feedback.router)
    app.include_router(metrics.router)
    app.include_router(openapi.router)
    app.include_router(usage.router)
    if services.batches is not None:
        app.include_router(files.router)
        app.include_router(batch_plan.router)
        app.include_router(batches.router)
    if services.responses is not None:
        app.include_router(stored_responses.router)
    if services.conversations is not None:
        app.include_router(conversations.router)
    if services.admin_key is not None:
        app.include_router(keys.router)

    def may_watch(headers: dict[bytes, bytes]) -> None:
        services.check_operator(headers, "the console's events")

    app.router.routes.extend(console_routes(events, may_watch, behind_serve=behind_serve))
    if services.admin_key is not None:
        app.include_router(added_experts.router)
        app.include_router(admin.router)
    routes = [entry for entry in app.router.routes if isinstance(entry, Route)]
    for entry in routes:
        # An endpoint for GET also answers HEAD. The HTTP server then omits the body.
        if "GET" in (entry.methods or ()):
            entry.methods = {*(entry.methods or ()), "HEAD"}
    app.add_middleware(InternalErrorMiddleware)
    _add_error_handlers(app, [entry.path for entry in routes])
    return _guarded(InferenceShortcut(app, inference), services)


def _guarded(app: App, services: GatewayServices) -> App:
    """Put the rules for requests of other sites around an application."""
    server = services.config.server

    async def refuse(path: str, error: CoeError, send: Send) -> None:
        services.state.metrics.registry.add(REQUESTS_REJECTED, 1, error.code)
        response = error_response(error, dialect_of(path))
        await send_response(send, response.status, response.headers, response.body)

    guarded = CrossOriginMiddleware(
        app,
        rules=CrossOriginRules(server.host, server.allowed_hosts, server.cors_origins),
        keyless=services.keyless,
        refuse=refuse,
    )
    if not server.cors_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=server.cors_origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("*",),
        allow_private_network=True,
    )


def _add_error_handlers(app: FastAPI, paths: list[str]) -> None:
    @app.exception_handler(CoeError)
    async def answer_own_error(request: Request, error: CoeError) -> Response:
        return _response(error_response(error, _dialect(request)))

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        # `request.url` would fail on a query that is not UTF-8.
        path = str(request.scope["path"])[:128]
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            wrong_method = InvalidRequestError(f"{path} takes {allowed}, not {request.method}")
            response = error_response(wrong_method, _dialect(request))
            return _response(response, status=405, headers=error.headers)
        unknown = UnknownEndpointError(f"there is no {path}{hint_for(path, paths)}")
        return _response(error_response(unknown, _dialect(request)))


def _dialect(request: Request) -> Dialect:
    return dialect_of(request.scope["path"], request.scope["headers"])


def _response(
    error: ErrorResponse, *, status: int | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    response = Response(error.body, status_code=status or error.status)
    response.headers.update({name.decode(): value.decode() for name, value in error.headers})
    response.headers.update(headers or {})
    return response


class InferenceShortcut:
    """Passes requests that carry a prompt to their endpoint, and all others to FastAPI.

    FastAPI has a route for them as well, for other methods and for an application below a prefix.
    But its middleware would take every token through three sends that add nothing.
    """

    def __init__(self, app: App, inference: InferenceEndpoint) -> None:
        self._app = app
        self._inference = inference

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in _INFERENCE:
            await self._inference(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class InternalErrorMiddleware:
    """Answers an unhandled exception with an OpenAI error, and logs its type and traceback.

    The server's own handler would log the exception's text, which may quote a prompt.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _INFERENCE:
            await self._app(scope, receive, send)
            return
        started = False

        async def tracked_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, tracked_send)
        except Exception:
            log.exception("unhandled exception in an endpoint")
            if started:
                # The reply has begun, so it can only be cut short.
                raise ConnectionResetError(CoeError.code) from None
            response = error_response(
                CoeError("internal error; the log holds its type and traceback"),
                dialect_of(scope["path"]),
            )
            await send_response(send, response.status, response.headers, response.body)
