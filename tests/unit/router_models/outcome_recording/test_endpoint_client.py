"""Replies of endpoints: what an answer says, and every way in which a call can fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from router_models.outcome_reader import OutcomeError
from router_models.outcome_recording.endpoint_client import CallError, Endpoint
from service.broker.token_prices import Price

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def speaking(said: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that says these bytes to everyone."""
    heard: list[bytes] = []

    async def client_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        with contextlib.suppress(ConnectionError):
            writer.write(said)
            await writer.drain()
        await close(writer)

    server = await asyncio.start_server(client_connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        await end(server)


async def end(server: asyncio.Server) -> None:
    """Close a server, and wait for its connections' tasks, which Python 3.11 leaves alone."""
    server.close()
    await server.wait_closed()
    handlers = [task for task in asyncio.all_tasks() if "client_connected" in repr(task)]
    await asyncio.gather(*handlers)


def reply(data: Any, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    head = b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\n" + more
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def ask(url: str, timeout_s: float = 5.0) -> Any:
    async with Endpoint(url, key="sk-secret", timeout_s=timeout_s, concurrency=1) as endpoint:
        return await endpoint.ask(
            "m", [{"role": "user", "content": "hi"}], max_tokens=5, temperature=0.0
        )


async def test_endpoint_reads_an_answer() -> None:
    usage = {
        "prompt_tokens": 3,
        "completion_tokens": True,
        "completion_tokens_details": {"reasoning_tokens": 2},
        "coe": {"cost": -1},
    }
    data = {
        "choices": [{"message": {"content": None}, "finish_reason": "length"}],
        "usage": usage,
    }
    async with speaking(reply(data)) as (url, heard):
        got = await ask(url)
    assert (got.text, got.finish_reason, got.prompt_tokens) == ("", "length", 3)
    assert (got.completion_tokens, got.reasoning_tokens, got.cost) == (None, 2, None)
    assert heard[0].startswith(b"POST /v1/chat/completions ")


@pytest.mark.parametrize(
    ("said", "code", "retried", "charged", "final"),
    [
        (reply(b"no"), "no_json", False, True, False),
        (reply([]), "no_json", False, True, False),
        (reply({}), "no_answer", False, True, False),
        (reply({"choices": [{"message": {"content": 7}}]}), "no_answer", False, True, False),
        (reply({"choices": []}), "no_answer", False, True, False),
        (HEAD + b"content-length: 500\r\n\r\n{", "broken_off", True, True, False),
        (b"+OK another protocol\r\n", "broken_off", True, True, False),
        (b"", "broken_off", True, True, False),
        (reply(b"", b"503 Later", b"retry-after: 7\r\n"), "status_503", True, False, False),
        (
            reply({"error": {"message": "m", "code": "slow_down"}}, b"429 No"),
            "slow_down",
            True,
            False,
            False,
        ),
        (
            reply({"error": {"message": "m", "code": "insufficient_quota"}}, b"429 No"),
            "insufficient_quota",
            False,
            False,
            True,
        ),
        (reply({"error": "text"}, b"400 No"), "status_400", False, False, False),
        (reply({}, b"401 No"), "status_401", False, False, True),
        (reply(b"", b"302 There", b"location: /x\r\n"), "status_302", False, False, False),
    ],
)
async def test_endpoint_tells_how_a_call_failed(
    said: bytes, code: str, retried: bool, charged: bool, final: bool
) -> None:
    async with speaking(said) as (url, heard):
        with pytest.raises(CallError) as error:
            await ask(url)
    got = error.value
    assert (got.code, got.retried, got.charged, got.final) == (code, retried, charged, final)
    assert "sk-secret" not in str(got)
    assert len(heard) == 1  # no redirect was followed, and nothing sent twice


async def test_endpoint_timeout_may_have_cost_something() -> None:
    async def client_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await close(writer)

    server = await asyncio.start_server(client_connected, "127.0.0.1", 0)
    try:
        with pytest.raises(CallError, match=r"timeout: no answer within 0\.3 s") as error:
            await ask(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 0.3)
        assert error.value.charged
    finally:
        await end(server)


async def test_endpoint_too_large_a_reply_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router_models.outcome_recording.endpoint_client._MAX_REPLY_BYTES", 1000)
    async with speaking(HEAD + b"content-length: 9999\r\n\r\n" + b"x" * 2000) as (url, _):
        with pytest.raises(CallError, match="too large"):
            await ask(url)


async def test_endpoint_lists_models_with_prices() -> None:
    data = {
        "data": [
            {"id": "a", "coe": {"kind": "full", "price": {"prompt": 1, "completion": 2}}},
            {"id": "b", "coe": {"price": {"prompt": 1}}},
            {"id": 7},
            "x",
        ]
    }
    async with (
        speaking(reply(data)) as (url, heard),
        Endpoint(url + "/base/", key=None, timeout_s=5, concurrency=1) as endpoint,
    ):
        found = await endpoint.models()
    assert {name: one.price for name, one in found.items()} == {"a": Price(1.0, 2.0), "b": None}
    assert heard[0].startswith(b"GET /base/models ")


@pytest.mark.parametrize("url", ["", "x", "ftp://a", "http://", "127.0.0.1:8000"])
def test_endpoint_refuses_what_is_no_url(url: str) -> None:
    with pytest.raises(OutcomeError, match="is no URL"):
        Endpoint(url, key=None, timeout_s=1, concurrency=1)


async def test_endpoint_replaces_what_no_file_can_hold() -> None:
    choice = {"message": {"content": "a\ud800b"}, "finish_reason": "\udc00"}
    async with speaking(reply({"choices": [choice]})) as (url, _):
        found = await ask(url)
    assert (found.text, found.finish_reason) == ("a?b", "?")
    error = {"error": {"message": "no\ud800", "code": "\udfff"}}
    async with speaking(reply(error, b"400 Bad Request")) as (url, _):
        with pytest.raises(CallError, match=r"no\?") as caught:
            await ask(url)
    assert caught.value.code == "?"
