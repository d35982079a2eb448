"""The admin's endpoints for experts, their mixture-of-experts gates, aliases, and the config."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import add

import orjson
from fastapi import APIRouter, Request, Response

from service.errors import (
    ArtifactError,
    ConfigError,
    ConflictError,
    InvalidRequestError,
    ModelStoreError,
    PoolUnavailableError,
)
from service.gateway.dependencies import AdminRoute, Services, headers_of, json_response
from service.http.asgi_helpers import read_body
from service.moe.routing_counts import RoutingCounts

router = APIRouter(route_class=AdminRoute)

_MAX_BODY_BYTES = 10_000


@router.get("/admin/experts")
async def list_experts(services: Services) -> Response:
    """Return every pool's own account of its experts, and the experts that an admin has added.

    The config's capabilities of an expert are beside its account.

    A pool that is gone is left out.
    """
    links = services.directory.links()
    accounts = await asyncio.gather(*(link.experts() for link in links), return_exceptions=True)
    known = services.config.experts
    pools = {
        link.address.name: {
            name: {**told, "capabilities": known[name].capabilities} if name in known else told
            for name, told in account.items()
        }
        for link, account in zip(links, accounts, strict=True)
        if isinstance(account, dict)
    }
    return json_response({"pools": pools, "added": services.added.to_json()})


@router.get("/admin/aliases")
async def list_aliases(services: Services) -> Response:
    """Return the aliases that share requests: what this gateway counted, and roll-backs."""
    return json_response({"aliases": services.alias_traffic.to_json()})


@router.post("/admin/aliases/{name:path}/restore")
async def restore_alias(name: str, services: Services) -> Response:
    """Give the targets of an alias that were rolled back their requests again."""
    return json_response({"alias": name, "restored": services.alias_traffic.restore(name)})


@router.post("/admin/reload")
async def reload_config(services: Services) -> Response:
    """Put the config's file in force again."""
    if services.reload is None:
        raise ConflictError("this service's config is changed where it was deployed from")
    try:
        return json_response(await services.reload())
    except (ConfigError, ArtifactError, ModelStoreError) as error:
        raise ConflictError(error.message) from None


@router.post("/admin/release")
async def release(request: Request, services: Services) -> Response:
    """Let every pool give its accelerator back, until the next request.

    A body may say where weights stay: `{"keep": "host"}` or `{"keep": "disk"}`.
    """
    raw = await read_body(
        request.receive,
        _MAX_BODY_BYTES,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=services.config.server.limits.body_timeout_s,
    )
    keep = _keep(raw)
    links = services.directory.links()
    replies = await asyncio.gather(*(link.release(keep) for link in links), return_exceptions=True)
    pools = {}
    for link, reply in zip(links, replies, strict=True):
        if isinstance(reply, BaseException):
            if not isinstance(reply, PoolUnavailableError):
                raise reply
            continue
        status, body = reply
        if status >= 400:
            return Response(body, status_code=status, media_type="application/json")
        pools[link.address.name] = orjson.loads(body)
    return json_response({"pools": pools})


def _keep(raw: bytes) -> str:
    """The field `keep` of a body; empty without one."""
    try:
        data = orjson.loads(raw) if raw else {}
    except orjson.JSONDecodeError:
        data = None
    if not isinstance(data, dict) or data.keys() - {"keep"}:
        raise InvalidRequestError("the body must be a JSON object with `keep`, or empty")
    keep = data.get("keep")
    if keep not in (None, "host", "disk"):
        raise InvalidRequestError("`keep` must be host or disk", param="keep")
    return keep or ""


@router.post("/admin/experts/{name:path}/{act}")
async def operate(name: str, act: str, services: Services) -> Response:
    """Do an act, as `pin` or `load`, to an expert in every pool that holds it."""
    links = services.directory.holding(name)
    replies = await asyncio.gather(*(link.operate(act, name) for link in links))
    for status, body in replies:
        if status >= 400:
            return Response(body, status_code=status, media_type="application/json")
    return json_response({"expert": name, "done": act, "pools": len(links)})


@router.get("/admin/experts/{name:path}/log")
async def server_log(name: str, services: Services) -> Response:
    """Return the last lines of an expert's server in each pool, where a command starts it.

    Raises:
        UnknownModelError: No pool has the expert, or no command starts it.
        PoolUnavailableError: No pool that has it could be reached.
    """
    links = services.directory.holding(name)
    replies = await asyncio.gather(
        *(link.server_log(name) for link in links), return_exceptions=True
    )
    answers = {
        link.address.name: reply
        for link, reply in zip(links, replies, strict=True)
        if isinstance(reply, tuple)
    }
    if not answers:
        raise PoolUnavailableError(f"no pool that holds {name[:128]!r} can be reached")
    for status, body in answers.values():
        if status != 200:
            return Response(body, status_code=status, media_type="application/json")
    pools = {pool: orjson.loads(body)["lines"] for pool, (_, body) in answers.items()}
    return json_response({"expert": name, "pools": pools})


@router.get("/admin/experts/{name:path}/moe")
async def routing_counts(name: str, services: Services) -> Response:
    """Return what the gates of an expert chose, summed over all pools.

    Where no pool has counted anything, the first pool's reply says why.

    Raises:
        UnknownModelError: No pool has the expert.
        PoolUnavailableError: No pool that has it could be reached.
    """
    links = services.directory.holding(name)
    replies = await asyncio.gather(
        *(link.moe_statistics(name) for link in links), return_exceptions=True
    )
    answers = [reply for reply in replies if isinstance(reply, tuple)]
    if not answers:
        raise PoolUnavailableError(f"no pool that holds {name[:128]!r} can be reached")
    counts = [
        RoutingCounts.from_wire(orjson.loads(body)) for status, body in answers if status == 200
    ]
    if not counts:
        status, body = answers[0]
        return Response(body, status_code=status, media_type="application/json")
    # While its weights are being changed, pools may have different models of this name.
    same_model = [count for count in counts if count.like(counts[0])]
    total = reduce(add, same_model)
    return json_response({"expert": name, "pools": len(same_model), **total.to_json()})
