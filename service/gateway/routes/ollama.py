"""Ollama's API: endpoints that carry a prompt, as faces of OpenAI's, and lists of models."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service import __version__
from service.errors import CoeError, UnknownModelError
from service.gateway.dependencies import (
    CurrentTenant,
    GatewayServices,
    Services,
    headers_of,
    json_response,
)
from service.gateway.ollama import model_lists
from service.gateway.ollama.replies import OllamaSend, without_prompt
from service.gateway.ollama.requests import (
    TranslatedRequest,
    json_object,
    model_name,
    translated,
)
from service.gateway.request.large_bodies import apart
from service.gateway.routes import models
from service.gateway.routes.inference import InferenceEndpoint
from service.http.asgi_helpers import (
    ClientDisconnectedError,
    Message,
    Receive,
    Send,
    read_body,
    send_json,
)
from service.types import Tenant

router = APIRouter()

_MAX_SHOW_BYTES = 10_000
# A pool may still be ending the request whose answer is complete.
_UNLOAD_TRIES, _UNLOAD_PAUSE_S = 5, 0.1


@router.get("/api/version")
async def version() -> Response:
    """Return the version of Ollama whose API this is, and ours."""
    return json_response({"version": model_lists.API_VERSION, "coe": __version__})


@router.get("/api/tags")
async def tags(services: Services, tenant: CurrentTenant) -> Response:
    """Return the models that the tenant may use."""
    return json_response(model_lists.listed(_entries(services, tenant)))


@router.get("/api/ps")
async def running(services: Services, tenant: CurrentTenant) -> Response:
    """Return those of them whose weights are on a device."""
    return json_response(model_lists.running(_entries(services, tenant)))


@router.post("/api/show")
async def show(request: Request, services: Services, tenant: CurrentTenant) -> Response:
    """Return what is known of one model."""
    raw = await read_body(
        request.receive,
        _MAX_SHOW_BYTES,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    services.intake.check_shape(raw)
    name = model_name(json_object(raw), known_names(services))
    entry = _entry(services, tenant, name)
    expert = services.config.experts.get(name)
    thinking = expert.thinking if expert is not None else None
    return json_response(
        model_lists.shown(entry, thinks=thinking is not None and thinking.enabled is not False)
    )


def known_names(services: GatewayServices) -> frozenset[str]:
    """The names that a config gives to models."""
    config = services.config
    return frozenset({*config.experts, *config.recipes, *config.aliases})


def _entries(services: GatewayServices, tenant: Tenant) -> list[dict[str, Any]]:
    states = models.public_states(services)
    created_s = services.state.created_s
    found = models.listing(services.config, states, created_s, tenant, services.aliases)
    entries: list[dict[str, Any]] = found["data"]
    return entries


def _entry(services: GatewayServices, tenant: Tenant, name: str) -> dict[str, Any]:
    states, created_s = models.public_states(services), services.state.created_s
    found = models.entry(services.config, states, created_s, name, tenant, services.aliases)
    if found is None:
        raise UnknownModelError(f"model {name[:128]!r} not found", param="model")
    return found


class OllamaEndpoint:
    """One endpoint of Ollama's API that carries a prompt, as a plain ASGI application.

    Args:
        path: Its path.
        services: The gateway's services.
        inference: Answers the same request of OpenAI's API.
    """

    def __init__(self, path: str, services: GatewayServices, inference: InferenceEndpoint) -> None:
        self._path = path
        self._services = services
        self._inference = inference
        self._known = known_names(services)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        services = self._services
        headers = services.intake.headers(scope["headers"])
        # Only clients of ours may send a body. The inference endpoint admits the request itself.
        services.admission.identify(headers)
        try:
            raw = await read_body(
                receive,
                services.config.server.max_body_bytes,
                declared=headers.get(b"content-length", b""),
                timeout_s=services.config.server.limits.body_timeout_s,
            )
        except ClientDisconnectedError:
            return
        request, body = await apart(partial(self._translated, raw), len(raw))
        if not request.asks:
            # It calls no expert, but counts as a request.
            tenant = await services.admission.look_up(headers)
            await self._answer_without_prompt(request, headers, tenant, send)
            return
        reply = OllamaSend(self._path, request, send)
        own = (b"content-length", b"transfer-encoding")
        kept = [pair for pair in scope["headers"] if pair[0] not in own]
        inner = {
            **scope,
            "path": request.path,
            "raw_path": request.path.encode(),
            "headers": [*kept, (b"content-length", str(len(body)).encode())],
        }
        await self._inference(inner, _Body(body, receive), reply)
        if request.unloads and reply.status == 200:
            await self._unload(reply.expert, headers)

    def _translated(self, raw: bytes) -> tuple[TranslatedRequest, bytes]:
        self._services.intake.check_shape(raw)
        request = translated(self._path, raw, self._known)
        return request, orjson.dumps(request.body)

    async def _answer_without_prompt(
        self,
        request: TranslatedRequest,
        headers: dict[bytes, bytes],
        tenant: Tenant,
        send: Send,
    ) -> None:
        """Load or unload a model, where the key may, and answer as Ollama does.

        Raises:
            UnknownModelError: There is no such model.
        """
        _entry(self._services, tenant, request.model)
        act = "unload" if request.unloads else "load"
        if request.model in self._services.config.experts:
            await self._operate(act, request.model, headers)
        answer = without_prompt(self._path, request.model, act)
        await send_json(send, 200, orjson.dumps(answer) + b"\n")

    async def _unload(self, expert: str, headers: dict[bytes, bytes]) -> None:
        for _ in range(_UNLOAD_TRIES):
            if await self._operate("unload", expert, headers):
                return
            await asyncio.sleep(_UNLOAD_PAUSE_S)

    async def _operate(self, act: str, expert: str, headers: dict[bytes, bytes]) -> bool:
        """Do an act in every pool that holds an expert; return False where a pool refused.

        Nothing is done for keys that may not, and for experts that no pool holds.
        """
        if not self._services.is_operator(headers):
            return True
        with suppress(CoeError):
            links = self._services.directory.holding(expert)
            replies = await asyncio.gather(*(link.operate(act, expert) for link in links))
            return all(status < 400 for status, _ in replies)
        return True


class _Body:
    """An ASGI `receive` with a body that is there, and then the client's messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}
