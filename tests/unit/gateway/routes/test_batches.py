"""Bodies of `/v1/batches` that never end, or that are too large."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from service.errors import BodyTooLargeError, RequestTimeoutError
from service.gateway.routes.batch_plan import plan_batch
from service.gateway.routes.batches import create_batch
from service.types import NOBODY


async def create(request: Any, services: Any) -> Any:
    return await create_batch(request, services, SimpleNamespace(), NOBODY)  # type: ignore[arg-type]


async def plan(request: Any, services: Any) -> Any:
    return await plan_batch(request, services, NOBODY)


@pytest.mark.parametrize("endpoint", [create, plan])
@pytest.mark.parametrize(
    ("declared", "error"), [(b"10", RequestTimeoutError), (b"99999999", BodyTooLargeError)]
)
async def test_body_that_does_not_come_is_refused(
    endpoint: Callable[..., Any], declared: bytes, error: type[Exception]
) -> None:
    async def receive() -> Any:
        await asyncio.Event().wait()

    server = SimpleNamespace(max_body_bytes=100_000, limits=SimpleNamespace(body_timeout_s=0.01))
    services = SimpleNamespace(config=SimpleNamespace(server=server))
    request = SimpleNamespace(receive=receive, scope={"headers": [(b"content-length", declared)]})
    with pytest.raises(error):
        async with asyncio.timeout(60):
            await endpoint(request, services)
