"""`/admin/experts`: adds and removes experts while the service runs, also by vLLM's names."""

from __future__ import annotations

import time
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service.config.effective_config import parse_added_expert
from service.errors import ConfigError, ConflictError, InvalidRequestError
from service.gateway.dependencies import (
    AdminRoute,
    GatewayServices,
    Services,
    add_audit_details,
    headers_of,
    json_response,
)
from service.http.asgi_helpers import read_body

router = APIRouter(route_class=AdminRoute)

_MAX_BODY_BYTES = 4 * 1024**2


@router.post("/admin/experts")
async def add_expert(request: Request, services: Services) -> Response:
    """Add an expert; it is served when this replies."""
    name = await _add(request, services, await _object(request, services))
    return json_response({"expert": name, "added": services.added.to_json()[name]})


@router.delete("/admin/experts/{name:path}")
async def remove_expert(name: str, request: Request, services: Services) -> Response:
    """Remove an added expert; its running requests end first."""
    add_audit_details(request, expert=name[:128])
    await services.added.remove(name)
    return json_response({"expert": name, "removed": True})


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request, services: Services) -> Response:
    """Add an adapter by vLLM's name of this call; the base is the one that it fits."""
    data = await _object(request, services)
    name, path = _text(data, "lora_name"), _text(data, "lora_path")
    in_place = data.pop("load_inplace", False)
    if not isinstance(in_place, bool):
        raise InvalidRequestError("`load_inplace` must be true or false", param="load_inplace")
    if data.pop("is_3d_lora_weight", False) is not False:
        raise InvalidRequestError(
            "`is_3d_lora_weight` must be false; other adapters can't be added",
            param="is_3d_lora_weight",
        )
    _refuse_others(data, "lora_name, lora_path, load_inplace, is_3d_lora_weight")
    answer = Response(
        f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain"
    )
    if in_place and name in services.added.known.experts:
        add_audit_details(request, expert=name)
        await services.added.replace_adapter(name, path)
        return answer
    try:
        bases = await services.added.bases_for(name, path)
    except ConfigError as error:
        raise InvalidRequestError(error.message) from None
    if len(bases) != 1:
        listed = ", ".join(bases) or "none"
        raise ConflictError(
            f"adapter {name[:128]!r}: the experts that it may have as its base: {listed}; name the "
            "base by POST /admin/experts"
        )
    await _add(request, services, {"name": name, "base": bases[0], "adapter": path})
    return answer


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request, services: Services) -> Response:
    """Remove an adapter by vLLM's name of this call."""
    data = await _object(request, services)
    name = _text(data, "lora_name")
    if data.pop("lora_int_id", None) is not None:
        raise InvalidRequestError("name the adapter by `lora_name`", param="lora_int_id")
    _refuse_others(data, "lora_name")
    add_audit_details(request, expert=name[:128])
    await services.added.remove(name)
    text = f"Success: LoRA adapter '{name}' removed successfully."
    return Response(text, media_type="text/plain")


async def _add(request: Request, services: GatewayServices, data: dict[str, Any]) -> str:
    """Add an expert, and return its name."""
    try:
        name, wanted = parse_added_expert(data, time.time())
    except ConfigError as error:
        raise InvalidRequestError(error.message) from None
    add_audit_details(request, expert=name, base=wanted.expert.base)
    await services.added.add(name, wanted)
    return name


async def _object(request: Request, services: GatewayServices) -> dict[str, Any]:
    raw = await read_body(
        request.receive,
        _MAX_BODY_BYTES,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return data


def _text(data: dict[str, Any], field: str) -> str:
    value = data.pop(field, None)
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(f"`{field}` must be a text", param=field)
    return value


def _refuse_others(data: dict[str, Any], allowed: str) -> None:
    if data:
        raise InvalidRequestError(f"unknown field {next(iter(data))[:64]!r}; allowed: {allowed}")
