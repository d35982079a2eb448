"""Requests with a prompt pass Serve's layers by, and all others reach Serve; none lacks an id."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import aiohttp
import pytest
import uvicorn
from uvicorn.config import HTTP_PROTOCOLS

from service.deployment.direct_prompts import DirectPromptProtocol, use_by_default
from service.http.prompt_endpoints import ENDPOINTS
from tests.support.in_process_service import serving

CHAT = "/v1/chat/completions"
WATCHED = {"x-request-disconnect-disabled": "?1"}


class Layer:
    """An application that answers with its name and the id that it saw."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        seen = dict(scope["headers"]).get(b"x-request-id", b"none")
        headers = [(b"layer", self.name.encode()), (b"seen", seen)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def protocol(gateway: Any) -> Any:
    return partial(DirectPromptProtocol, gateway)


@pytest.mark.parametrize(
    ("method", "path", "headers", "layer"),
    [
        *(("POST", path, WATCHED, "gateway") for path in ENDPOINTS),
        ("POST", CHAT, {}, "serve"),
        ("POST", CHAT, {"x-request-disconnect-disabled": "?0"}, "serve"),
        ("GET", CHAT, WATCHED, "serve"),
        ("POST", CHAT + "/more", WATCHED, "serve"),
        ("POST", "/v1/files", WATCHED, "serve"),
        ("GET", "/-/healthz", {}, "serve"),
    ],
)
async def test_requests_reach_the_layer_that_answers_them(
    method: str, path: str, headers: dict[str, str], layer: str
) -> None:
    async with (
        serving(Layer("serve"), protocol(Layer("gateway"))) as served,
        aiohttp.ClientSession() as client,
        client.request(method, served.url + path, headers=headers) as reply,
    ):
        assert reply.headers["layer"] == layer
        # Serve's middleware gives the others an id.
        assert ("x-request-id" in reply.headers) == (layer == "gateway")


async def test_a_reply_has_the_given_id_or_a_new_one_and_the_gateway_sees_it() -> None:
    async with (
        serving(Layer("serve"), protocol(Layer("gateway"))) as served,
        aiohttp.ClientSession() as client,
    ):
        found = []
        for given in ({"x-request-id": "mine"}, {}, {}):
            async with client.post(served.url + CHAT, headers={**WATCHED, **given}) as reply:
                assert reply.headers.getall("x-request-id") == [reply.headers["seen"]]
                found.append(reply.headers["seen"])
    assert found[0] == "mine"
    assert len(set(found)) == 3
    assert "none" not in found


async def test_a_server_that_is_told_to_stop_waits_for_them() -> None:
    began, gate = asyncio.Event(), asyncio.Event()

    async def gateway(scope: Any, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        began.set()
        await gate.wait()
        await send({"type": "http.response.body", "body": b"last"})

    async with (
        serving(Layer("serve"), protocol(gateway)) as served,
        aiohttp.ClientSession() as client,
    ):

        async def ask() -> bytes:
            async with client.post(served.url + CHAT, headers=WATCHED) as reply:
                return await reply.read()

        asking = asyncio.create_task(ask())
        await began.wait()
        stopping = asyncio.create_task(served.server.shutdown())
        await asyncio.sleep(0)
        gate.set()
        assert await asking == b"first last"
        await stopping


def test_servers_that_name_no_protocol_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray Serve's: a release of uvicorn that chooses otherwise would lose it silently."""
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])
    gateway = Layer("gateway")
    use_by_default(gateway)
    config = uvicorn.Config(lambda: None, factory=True, lifespan="off", log_config=None)
    config.load()
    assert config.http_protocol_class.func is DirectPromptProtocol  # type: ignore[attr-defined]
    assert config.http_protocol_class.args == (gateway,)  # type: ignore[attr-defined]
