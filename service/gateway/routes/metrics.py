"""`GET /metrics`: this gateway, the node's other gateways, and every pool.

`GET /metrics/model-server` has the sums by which an endpoint picker of Kubernetes chooses.
"""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from service.errors import PoolUnavailableError
from service.gateway.dependencies import Services, headers_of
from service.rpc.pool_link import PoolLink
from service.telemetry.model_server_metrics import ModelServerLoad
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


@router.get("/metrics/model-server")
async def model_server_metrics(request: Request, services: Services) -> Response:
    """Return the metrics of the model server protocol, over all pools and remote experts."""
    if not services.config.telemetry.model_server_metrics:
        services.check_operator(headers_of(request), "/metrics/model-server")
    pools = await asyncio.gather(*map(_pool_load, services.directory.links()))
    load = ModelServerLoad.sum_of([services.remote_load(), *pools])
    return PlainTextResponse(load.text(time.time()), media_type=CONTENT_TYPE)


async def _pool_load(link: PoolLink) -> ModelServerLoad:
    """A pool's load; none where the pool has just gone."""
    try:
        return ModelServerLoad.from_wire(await link.model_server_load())
    except PoolUnavailableError:
        return ModelServerLoad()


async def _pool_metrics(link: PoolLink) -> str:
    """A pool's metrics; empty where the pool has just gone."""
    try:
        return await link.metrics()
    except PoolUnavailableError:
        return ""
