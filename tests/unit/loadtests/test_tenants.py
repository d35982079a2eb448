"""The tenants load test counts replies of a fake service."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import orjson
import pytest

from loadtests.tenants.tenant_clients import ENDPOINTS, MANY, Clients
from service.config import SimulatedOptions
from service.engine.engine_interface import EngineRequest
from service.engine.simulated_engine import SimulatedEngine
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import serving


class Fake:
    """Grants `allowed` answers of 2 tokens each, then refuses; `status` instead, if given."""

    def __init__(self, allowed: int, status: int = 0, retry: bool = True) -> None:
        self.left = allowed
        self.spent = 0
        self.status = status
        self.retry = retry

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"application/json")]
        status, body = 200, {"usage": {"completion_tokens": 2}}
        if scope["path"] == "/v1/usage":
            body = {"limits": [{"spent": self.spent}]}
        elif self.status:
            status, body = self.status, {}
        elif not self.left:
            status, body = 429, {}
            headers += [(b"retry-after", b"1")] if self.retry else []
        else:
            self.left -= 1
            self.spent += 2
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": orjson.dumps(body)})


async def test_hammer_counts_granted_and_refused_requests() -> None:
    async with serving(Fake(30)) as served:
        clients = Clients(int(served.url.rpartition(":")[2]), "key", seed=1)
        await clients.hammer(8, 60, leaving=0)
        assert (clients.served, clients.used_tokens, await clients.spent()) == (30, 60, 60)
        assert clients.refused >= 8


@pytest.mark.parametrize(
    ("fake", "message"),
    [(Fake(0, 500), "status 500"), (Fake(0, retry=False), "without Retry-After")],
)
async def test_hammer_other_reply_ends_the_run(fake: Fake, message: str) -> None:
    async with serving(fake) as served:
        clients = Clients(int(served.url.rpartition(":")[2]), "key", seed=1)
        with pytest.raises(RuntimeError, match=message):
            await clients.hammer(2, 10, leaving=0)


async def test_hammer_accepted_invalid_request_ends_the_run() -> None:
    async with serving(Fake(30)) as served:
        clients = Clients(int(served.url.rpartition(":")[2]), "key", seed=1)
        shapes = [shape for shape in MANY if shape.refused]
        with pytest.raises(RuntimeError, match="status 200"):
            await clients.hammer(2, 10, leaving=0, shapes=shapes)


async def test_hammer_client_aborts_are_counted_apart() -> None:
    class Slow(Fake):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] != "/v1/usage":
                self.spent += 2
                await asyncio.sleep(0.05)
            await super().__call__(scope, receive, send)

    async with serving(Slow(10**6)) as served:
        clients = Clients(int(served.url.rpartition(":")[2]), "key", seed=1)
        await clients.hammer(4, 60, leaving=1.0)
        assert clients.gone > 0


async def test_hammer_leaves_streams_of_every_endpoint_after_some_tokens() -> None:
    engine = SimulatedEngine(("sim",), SimulatedOptions(decode_ms=20))

    class Engine(Fake):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["path"] == "/v1/usage":
                await super().__call__(scope, receive, send)
                return
            body = await read_body(receive, 10**6)
            self.spent += 1
            with suppress(OSError):
                await engine.run(EngineRequest(scope["path"], "sim", body, "request"), send)

    async with serving(Engine(0)) as served:
        clients = Clients(int(served.url.rpartition(":")[2]), "key", seed=1)
        await clients.hammer(8, 100, leaving=0.5, shapes=ENDPOINTS)
    assert clients.left_on.keys() == {
        (shape.path, stream) for shape in ENDPOINTS for stream in (False, True)
    }
    assert clients.left <= clients.seen_tokens <= 3 * clients.left
    assert clients.used_tokens == 7 * clients.served
    assert clients.most_unseen_tokens == 7 * (clients.left + clients.gone) - clients.seen_tokens
