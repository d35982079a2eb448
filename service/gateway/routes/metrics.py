"""`GET /metrics`: this gateway, the node's other gateways, and every pool."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.errors import PoolUnavailableError
from service.gateway.dependencies import Services, headers_of
from service.rpc.pool_link import PoolLink
from service.telemetry.prometheus_exposition import CONTENT_TYPE, join

router = APIRouter()


@router.get("/metrics")
async def metrics(request: Request, services: Services) -> Response:
    """Return all metrics in Prometheus' text format."""
    services.check_operator(headers_of(request), "/metrics")
    directory = services.directory
    own, neighbours, pools = await asyncio.gather(
        services.state.metrics.text({"gateway": directory.gateway}),
        services.neighbours(),
        asyncio.gather(*map(_pool_metrics, directory.links())),
    )
    text = await asyncio.to_thread(join, [own, *neighbours, *pools])
    return PlainTextResponse(text, media_type=CONTENT_TYPE)


async def _pool_metrics(link: PoolLink) -> str:
    """A pool's metrics; empty where the pool has just gone."""
    try:
        return await link.metrics()
    except PoolUnavailableError:
        return ""
