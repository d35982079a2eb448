"""`/admin/keys`: the admin lists, creates, rotates and revokes API keys."""

from __future__ import annotations

import time
from typing import TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from service.gateway.api_key_requests import NewKey, Rotation, new_key_record, parse_key_body
from service.gateway.dependencies import AdminRoute, Services, add_audit_details, json_response
from service.http.asgi_helpers import read_body

router = APIRouter(route_class=AdminRoute)

_MAX_BODY_BYTES = 64 * 1024
_Body = TypeVar("_Body", bound=BaseModel)


@router.get("/admin/keys")
async def list_keys(services: Services) -> Response:
    """Return every stored key, without its secret."""
    now_s = time.time()
    records = await services.keys.records()
    return json_response({"keys": [record.to_public(now_s) for record in records]})


@router.post("/admin/keys")
async def create_key(request: Request, services: Services) -> Response:
    """Create a key. Only this reply ever shows it."""
    body = await _body(request, NewKey)
    now_s = time.time()
    new_record = new_key_record(services.config, body, now_s)
    record, key = await services.keys.create(new_record, now_s)
    await services.admission.authenticator.look()
    add_audit_details(request, key=record.id, tenant=record.tenant)
    return json_response({**record.to_public(now_s), "key": key})


@router.post("/admin/keys/{id}/rotate")
async def rotate_key(request: Request, services: Services) -> Response:
    """Replace a key by a new one; the old one stays valid for the grace period."""
    body = await _body(request, Rotation)
    now_s = time.time()
    record, key = await services.keys.rotate(request.path_params["id"], now_s, body.grace_s)
    await services.admission.authenticator.look()
    add_audit_details(request, key=record.id, tenant=record.tenant)
    return json_response({**record.to_public(now_s), "key": key})


@router.post("/admin/keys/{id}/revoke")
async def revoke_key(request: Request, services: Services) -> Response:
    """Revoke a key: here at once, at other gateways within a second."""
    now_s = time.time()
    record = await services.keys.revoke(request.path_params["id"], now_s)
    await services.admission.authenticator.look()
    add_audit_details(request, key=record.id, tenant=record.tenant)
    return json_response(record.to_public(now_s))


async def _body(request: Request, kind: type[_Body]) -> _Body:
    return parse_key_body(kind, await read_body(request.receive, _MAX_BODY_BYTES))
