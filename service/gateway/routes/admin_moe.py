"""`GET /admin/experts/NAME/moe`: what the routers of an expert chose, over all pools."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import add

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.errors import PoolUnavailableError
from service.moe.routing_counts import RoutingCounts
from service.rpc.pool_directory import PoolDirectory


async def routed(directory: PoolDirectory, request: Request) -> Response:
    """The sums of all pools that know something; else why the first one does not.

    Raises UnknownModelError where no pool has the expert, PoolUnavailableError where none answered.
    """
    name = request.path_params["name"]
    links = directory.holding(name)
    told = await asyncio.gather(*(link.routes(name) for link in links), return_exceptions=True)
    answers = [one for one in told if isinstance(one, tuple)]
    if not answers:
        raise PoolUnavailableError(f"no pool that holds {name[:128]!r} can be reached")
    tallies = [
        RoutingCounts.from_wire(orjson.loads(body)) for status, body in answers if status == 200
    ]
    if not tallies:
        status, body = answers[0]
        return Response(body, status_code=status, media_type="application/json")
    # While its weights are being changed, pools may have different models of this name.
    alike = [one for one in tallies if one.like(tallies[0])]
    whole = {"expert": name, "pools": len(alike), **reduce(add, alike).to_json()}
    return Response(orjson.dumps(whole), media_type="application/json")
