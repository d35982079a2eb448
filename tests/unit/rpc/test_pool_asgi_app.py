"""A pool's port: which endpoint answers what, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest

from service.errors import CoeError, ConflictError
from service.http.asgi_helpers import Message, Send, body_message, start_response
from service.rpc.call_headers import Call
from service.rpc.cluster_secret import HEADER
from service.rpc.pool_asgi_app import PoolApp

SECRET = "secret"
CALL = Call("/v1/completions", "e", "id", 250, True, "gateway", 7)


class Pool:
    """A pool that keeps what it was asked for, and its own reports."""

    def __init__(self, error: Exception | None = None, *, begins: bool = False) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self._error = error
        self._begins = begins

    async def run(self, call: Call, body: bytes, send: Send) -> None:
        self.asked.append(("run", call.expert, body))
        if self._begins:
            await send(start_response(200, [(b"content-type", b"text/event-stream")]))
            await send(body_message(b"data: 1\n\n", more=True))
        if self._error is not None:
            raise self._error
        await send(start_response(200, []))
        await send(body_message(b"answer"))

    async def used(self, request_id: str) -> tuple[int, int] | None:
        self.asked.append(("used", request_id))
        return 3, 4

    async def snapshots(self) -> AsyncIterator[bytes]:
        self.asked.append(("snapshots",))
        yield b"{}\n"

    def demand(self, wanted: dict[str, float]) -> None:
        self.asked.append(("demand", wanted))

    async def operate(self, operation: str, expert: str) -> None:
        self.asked.append(("operate", operation, expert))
        if self._error is not None:
            raise self._error

    async def metrics(self) -> str:
        self.asked.append(("metrics",))
        return "figure 1\n"

    def experts(self) -> dict[str, Any]:
        self.asked.append(("experts",))
        return {"e": {}}

    async def gpus(self) -> list[dict[str, Any]]:
        self.asked.append(("gpus",))
        return [{"index": 0, "reserved_bytes": 1}]

    async def moe_statistics(self, expert: str) -> dict[str, Any]:
        self.asked.append(("moe_statistics", expert))
        return {"layers": 2}

    async def server_log(self, expert: str) -> dict[str, Any]:
        self.asked.append(("server_log", expert))
        return {"lines": ["a"]}


async def send_request(
    pool: Pool,
    method: str,
    path: str,
    *,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    secret: str = SECRET,
) -> tuple[int, bytes]:
    """Send one request to the pool's application, and return the status and the body."""
    messages: list[Message] = []
    given = {HEADER: secret, **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        if (part := next(parts, None)) is not None:
            return part
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    await PoolApp(pool, pool, SECRET, 1000)(scope, receive, send)
    return messages[0]["status"], b"".join(part.get("body", b"") for part in messages[1:])


@pytest.mark.parametrize(
    ("method", "path", "body", "asked", "answer"),
    [
        ("GET", "/snapshots", b"", ("snapshots",), b"{}\n"),
        ("GET", "/metrics", b"", ("metrics",), b"figure 1\n"),
        ("GET", "/experts", b"", ("experts",), b'{"e":{}}'),
        ("GET", "/gpus", b"", ("gpus",), b'[{"index":0,"reserved_bytes":1}]'),
        ("GET", "/used/a-again1", b"", ("used", "a-again1"), b"[3,4]"),
        ("GET", "/moe-statistics/org/e", b"", ("moe_statistics", "org/e"), b'{"layers":2}'),
        ("GET", "/server-log/org/e", b"", ("server_log", "org/e"), b'{"lines":["a"]}'),
        ("POST", "/demand", b'{"e":1}', ("demand", {"e": 1.0}), b"{}"),
        ("POST", "/operate/pin/org/e", b"", ("operate", "pin", "org/e"), b"{}"),
        ("POST", "/v1/completions", b"prompt", ("run", "e", b"prompt"), b"answer"),
    ],
)
async def test_pool_app_endpoint_asks_the_pool(
    method: str, path: str, body: bytes, asked: tuple[Any, ...], answer: bytes
) -> None:
    pool = Pool()
    replied = await send_request(pool, method, path, body=body, headers=CALL.headers())
    assert replied == (200, answer)
    assert pool.asked == [asked]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/completions", b"", 404, "not_found"),
        ("GET", "/demand", b"", 404, "not_found"),
        ("POST", "/demand", b"[1]", 400, "invalid_request_error"),
        ("POST", "/v1/completions", b"prompt", 400, "invalid_request_error"),
    ],
)
async def test_pool_app_wrong_request_gets_one_error(
    method: str, path: str, body: bytes, status: int, code: str
) -> None:
    pool = Pool()
    replied = await send_request(pool, method, path, body=body)
    assert (replied[0], orjson.loads(replied[1])["error"]["code"]) == (status, code)
    assert pool.asked == []


@pytest.mark.parametrize(
    "path", ["/snapshots", "/metrics", "/experts", "/gpus", "/used/a", "/v1/models"]
)
async def test_pool_app_without_the_cluster_s_secret_refuses(path: str) -> None:
    pool = Pool()
    assert (await send_request(pool, "GET", path, secret="other"))[0] == 401
    assert pool.asked == []


async def test_pool_app_own_error_keeps_its_code() -> None:
    replied = await send_request(Pool(ConflictError("pinned")), "POST", "/operate/evict/e")
    assert (replied[0], orjson.loads(replied[1])["error"]["message"]) == (409, "pinned")


async def test_pool_app_unexpected_error_does_not_quote_its_text() -> None:
    pool = Pool(ValueError("a prompt"))
    replied = await send_request(pool, "POST", "/v1/completions", headers=CALL.headers())
    assert replied[0] == 500
    assert b"a prompt" not in replied[1]


async def test_pool_app_error_in_a_stream_becomes_an_event() -> None:
    pool = Pool(CoeError("gone"), begins=True)
    status, body = await send_request(pool, "POST", "/v1/completions", headers=CALL.headers())
    assert status == 200
    assert body.startswith(b"data: 1\n\n")
    assert b"gone" in body.removeprefix(b"data: 1\n\n")
