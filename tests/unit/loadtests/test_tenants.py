"""The tenants load test counts replies of a fake service."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from loadtests.tenants.client import MANY, Clients
from tests.support.serving import serving


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
