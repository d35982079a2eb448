"""The admin's endpoints: experts in every pool, and the config anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from service.errors import (
    ArtifactError,
    CoeError,
    ConfigError,
    ConflictError,
    ModelStoreError,
    UnauthorizedError,
)
from service.gateway.audit_log import REFUSALS, acted
from service.gateway.routes.admin_moe import routed
from service.rpc.auth import same
from service.rpc.pool_directory import PoolDirectory

Endpoint = Callable[[Request], Awaitable[Response]]
Reload = Callable[[], Awaitable[dict[str, list[str]]]]
_LONGEST_PATH = 200


def admin_routes(
    directory: PoolDirectory, key: str, reload: Callable[[], Reload | None]
) -> list[BaseRoute]:
    """Endpoints that ask for the admin key. `reload` gives what puts the config's file in force
    anew, None where nobody here keeps it."""

    async def experts(request: Request) -> Response:
        links = directory.links()
        told = await asyncio.gather(*(link.experts() for link in links), return_exceptions=True)
        pools = {
            link.address.name: one
            for link, one in zip(links, told, strict=True)
            if isinstance(one, dict)
        }
        return as_json({"pools": pools})

    async def moe(request: Request) -> Response:
        return await routed(directory, request)

    async def again(request: Request) -> Response:
        act = reload()
        if act is None:
            raise ConflictError("this service's config is changed where it was deployed from")
        try:
            return as_json(await act())
        except (ConfigError, ArtifactError, ModelStoreError) as error:
            raise ConflictError(error.message) from None

    async def operate(request: Request) -> Response:
        name, act = request.path_params["name"], request.path_params["act"]
        links = directory.holding(name)
        answers = await asyncio.gather(*(link.operate(act, name) for link in links))
        for status, body in answers:
            if status >= 400:
                return Response(body, status_code=status, media_type="application/json")
        return as_json({"expert": name, "done": act, "pools": len(links)})

    return [
        Route("/admin/experts", guarded(experts, key), methods=["GET"]),
        Route("/admin/reload", guarded(again, key), methods=["POST"]),
        Route("/admin/experts/{name:path}/{act}", guarded(operate, key), methods=["POST"]),
        Route("/admin/experts/{name:path}/moe", guarded(moe, key), methods=["GET"]),
    ]


def as_json(body: dict[str, Any]) -> Response:
    """A reply of status 200."""
    return Response(orjson.dumps(body), media_type="application/json")


def guarded(endpoint: Endpoint, admin_key: str) -> Endpoint:
    """The endpoint, for who has the admin key; others get Unauthorized.

    What changes something is written into the audit log, with how it went.
    """

    async def checked(request: Request) -> Response:
        check_admin(dict(request.scope["headers"]), admin_key, "the admin endpoints")
        outcome = "cancelled"
        try:
            response = await endpoint(request)
            outcome = str(response.status_code)
            return response
        except CoeError as error:
            outcome = error.code
            raise
        except Exception as error:
            outcome = type(error).__name__
            raise
        finally:
            if request.method != "GET":
                path = str(request.scope["path"])[:_LONGEST_PATH]
                told = getattr(request.state, "audit", {})
                acted(f"{request.method} {path}", outcome, told)

    return checked


def note(request: Request, **details: object) -> None:
    """Put details of what is done into its line of the audit log."""
    request.state.audit = {**getattr(request.state, "audit", {}), **details}


def check_admin(headers: dict[bytes, bytes], admin_key: str | None, what: str) -> None:
    """Raises UnauthorizedError unless a request shows the admin key. `what` needs it."""
    if not shows_admin_key(headers, admin_key):
        REFUSALS.refused("admin" if headers.get(b"authorization") else "admin, none", headers)
        raise UnauthorizedError(f"the admin key is needed for {what}: Authorization: Bearer KEY")


def shows_admin_key(headers: dict[bytes, bytes], admin_key: str | None) -> bool:
    """Whether a request has the admin key as its Bearer token."""
    given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
    return admin_key is not None and same(given, admin_key.encode())
