"""Conversations over HTTP: tool results go back to the expert that called, in every API."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.config import Config
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import RunningGateway, run_gateway, serving, simulated
from tests.support.polling import until
from tests.support.redis_server import RedisServer, redis_server

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "How warm is it in Oslo?"}
CALL_ID = "call_7"


class ToolCaller:
    """An endpoint of three APIs whose model calls a tool in every answer, unless it is down."""

    def __init__(self) -> None:
        self.down: set[str] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await read_body(receive, 10**6))
        status, kind, parts = 200, "application/json", [b'{"error": {"message": "down"}}']
        if body["model"] in self.down:
            status = 503
        elif body.get("stream"):
            kind = "text/event-stream"
            events = STREAMED[scope["path"]]
            parts = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
            if scope["path"] == CHAT:
                parts.append(b"data: [DONE]\n\n")
        else:
            parts = [json.dumps({**WHOLE[scope["path"]], "model": body["model"]}).encode()]
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


FUNCTION = {"name": "warmth", "arguments": "{}"}
CHAT_CALL = {"id": CALL_ID, "type": "function", "function": FUNCTION}
USE = {"type": "tool_use", "id": CALL_ID, "name": "warmth", "input": {}}
FUNCTION_CALL = {"type": "function_call", "call_id": CALL_ID, **FUNCTION}
SAID = {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]}
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
WHOLE: dict[str, dict[str, Any]] = {
    CHAT: {
        "choices": [{"index": 0, "message": SAID, "finish_reason": "tool_calls"}],
        "usage": USAGE,
    },
    MESSAGES: {"type": "message", "role": "assistant", "content": [USE]},
    RESPONSES: {"object": "response", "output": [FUNCTION_CALL]},
}
STREAMED: dict[str, list[dict[str, Any]]] = {
    CHAT: [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, **CHAT_CALL}]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    ],
    MESSAGES: [
        {"type": "content_block_start", "index": 0, "content_block": USE},
        {"type": "message_stop"},
    ],
    RESPONSES: [
        {"type": "response.output_item.added", "item": FUNCTION_CALL},
        {"type": "response.completed", "response": {"output": [FUNCTION_CALL]}},
    ],
}
RESULTS: dict[str, list[dict[str, Any]]] = {
    CHAT: [SAID, {"role": "tool", "tool_call_id": CALL_ID, "content": "-3"}],
    MESSAGES: [
        {"role": "assistant", "content": [USE]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": CALL_ID, "content": "-3"}],
        },
    ],
    RESPONSES: [
        FUNCTION_CALL,
        {"type": "function_call_output", "call_id": CALL_ID, "output": "-3"},
    ],
}
MORE = [USER, {"role": "assistant", "content": "-3 degrees."}, {"role": "user", "content": "Why?"}]


def body(path: str = CHAT, turns: list[dict[str, Any]] | None = None, **more: Any) -> Any:
    field = "input" if path == RESPONSES else "messages"
    tools = {"tools": [{"type": "function", "function": FUNCTION}]} if path == CHAT else {}
    return {"model": "auto", "max_tokens": 9, field: [USER, *(turns or [])], **tools, **more}


def config(url: str, worse: float = 0.6, **more: Any) -> Config:
    experts = {
        name: {
            "remote": {"url": url + "/v1", "model": name},
            "categories": [category],
            "quality": {"general": quality, "code": quality},
            "capabilities": ["chat", "tools"],
        }
        for name, category, quality in (("better", "general", 0.9), ("worse", "code", worse))
    }
    server = {"breaker": {"failures": 1, "open_duration_s": 60}}
    return simulated({"cpu": {}}, experts={**experts, **LOCAL}, server=server, **more)


# Pools need an expert of their own.
LOCAL = {"local": {"model": "m", "capabilities": ["completions"]}}


@asynccontextmanager
async def site(worse: float = 0.6, **more: Any) -> AsyncIterator[tuple[RunningGateway, ToolCaller]]:
    upstream = ToolCaller()
    async with serving(upstream) as served, run_gateway(config(served.url, worse, **more)) as s:
        yield s, upstream


# The first turn goes to the worse expert, because the client excludes the other one.
FIRST: dict[str, Any] = {"coe": {"deny": ["better"]}}


async def ask(s: RunningGateway, what: Any, path: str = CHAT) -> tuple[str, str | None]:
    """The expert that answered, and what the session did."""
    async with s.post(what, path) as reply:
        assert reply.status == 200, await reply.text()
        await reply.read()
        return reply.headers["x-coe-expert"], reply.headers.get("x-coe-session")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_session_tool_result_goes_back_to_the_expert_that_called(
    path: str, stream: bool
) -> None:
    async with site() as (s, _):
        assert await ask(s, body(path, stream=stream, **FIRST), path) == ("worse", None)
        for _ in range(3):
            again = body(path, RESULTS[path], stream=stream)
            assert await ask(s, again, path) == ("worse", "locked")
        # Once it has answered, a better one takes over.
        answered = [*RESULTS[path], *MORE[1:]]
        assert await ask(s, body(path, answered), path) == ("better", "switched")
        async with s.get("/metrics") as reply:
            text = await reply.text()
        assert re.search(r'coe_session_turns_total\{.*decision="locked".*\} 3', text)
        assert re.search(r'coe_session_turns_total\{.*decision="switched".*\} 1', text)


async def test_session_small_gain_hands_nothing_over() -> None:
    async with site(worse=0.89) as (s, _):
        assert await ask(s, body(**FIRST)) == ("worse", None)
        assert await ask(s, body(turns=MORE[1:])) == ("worse", "kept")
        # Another conversation is not held.
        other = {**body(), "messages": [{"role": "user", "content": "Another matter."}]}
        assert await ask(s, other) == ("better", None)


async def test_session_disabled_chooses_turn_by_turn() -> None:
    async with site(router={"sessions": {"enabled": False}}) as (s, _):
        await ask(s, body(**FIRST))
        assert await ask(s, body(turns=RESULTS[CHAT])) == ("better", None)


async def test_session_yields_to_a_named_expert_or_another_category() -> None:
    async with site() as (s, _):
        await ask(s, body(model="auto/general", **FIRST))
        result = RESULTS[CHAT]
        assert await ask(s, body(turns=result, model="auto/general")) == ("worse", "locked")
        assert await ask(s, body(turns=result, model="auto/code")) == ("better", None)
        assert await ask(s, body(turns=result, model="better")) == ("better", None)
        # The named expert has called the tool again.
        assert await ask(s, body(turns=result * 2, model="auto")) == ("better", "locked")


async def test_session_expert_that_cannot_answer_is_released_with_a_reason() -> None:
    async with site() as (s, upstream):
        await ask(s, body(**FIRST))
        denied = body(turns=RESULTS[CHAT], coe={"deny": ["worse"]})
        assert await ask(s, denied) == ("better", "released; why=not_allowed")
    async with site() as (s, upstream):
        await ask(s, body(**FIRST))
        upstream.down = {"worse"}
        result = body(turns=RESULTS[CHAT])
        assert await ask(s, result) == ("better", "released; why=failed")
        upstream.down = set()
        # From now on the call is the other expert's.
        assert await ask(s, body(turns=RESULTS[CHAT] * 2)) == ("better", "locked")
    async with site() as (s, upstream):
        await ask(s, body(**FIRST))
        upstream.down = {"worse"}
        named = {**body(model="worse"), "messages": [{"role": "user", "content": "x"}]}
        async with s.post(named) as reply:
            assert reply.status == 503
        assert await ask(s, result) == ("better", "released; why=circuit_open")


async def test_session_expert_that_a_reload_removed_is_released() -> None:
    async with site() as (s, _):
        await ask(s, body(**FIRST))
        data = s.gateway.current.config.model_dump(mode="json")
        del data["experts"]["worse"]
        await s.gateway.reload(Config.model_validate(data))
        assert await ask(s, body(turns=RESULTS[CHAT])) == ("better", "released; why=gone")


async def test_session_unknown_call_is_told() -> None:
    async with site() as (s, _):
        assert await ask(s, body(turns=RESULTS[CHAT])) == ("better", "released; why=unknown")


async def test_session_cached_call_is_its_expert_s() -> None:
    tenants = {"default": {"cache": {"mode": "exact"}}}
    async with site(tenants=tenants) as (s, _):
        for expected in ("miss", "exact"):
            headers = {"x-coe-cache": "exact", "x-session-id": expected}
            async with s.post(body(**FIRST), headers=headers) as reply:
                assert reply.headers["x-coe-cache"] == expected
                await reply.read()
        async with s.post(body(turns=RESULTS[CHAT]), headers={"x-session-id": "exact"}) as reply:
            assert reply.headers["x-coe-session"] == "locked"
            assert reply.headers["x-coe-expert"] == "worse"


async def test_route_tells_what_the_session_decides_and_changes_nothing() -> None:
    async with site() as (s, _):
        _, _, found = await s.ask(body(**FIRST), "/v1/route")
        assert (found["chosen"], found["session"]) == ("worse", None)
        await ask(s, body(**FIRST))
        for _ in range(2):
            _, _, found = await s.ask(body(turns=RESULTS[CHAT]), "/v1/route")
            assert found["chosen"] == "worse"
            assert found["session"] == {
                "decision": "locked",
                "recipe": "worse",
                "handover_cost": 0.0,
                "why": None,
            }
            why = {one["recipe"]: one["why"] for one in found["candidates"]}
            assert why["better"] == "a tool call of this conversation is open at another expert"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RedisServer, RedisServer]]:
    """One that counts, and one for what may be lost."""
    with (
        redis_server(tmp_path_factory.mktemp("counts")) as counting,
        redis_server(tmp_path_factory.mktemp("volatile")) as losing,
    ):
        yield counting, losing


async def test_session_is_shared_by_gateways_and_survives_a_hung_store(
    servers: tuple[RedisServer, RedisServer],
) -> None:
    counting, volatile = servers
    store = {"kind": "redis", "url": counting.url, "cache_url": volatile.url}
    router = {"sessions": {"max_wait_ms": 500}}
    upstream = ToolCaller()
    async with serving(upstream) as served:
        given = config(served.url, store=store, router=router)
        async with run_gateway(given) as one, run_gateway(given) as two:
            for gateway in (one, two):

                async def ready(gateway: RunningGateway = gateway) -> bool:
                    async with gateway.get("/v1/models") as reply:
                        return bool(reply.status == 200)

                await until(ready, "the gateway knows its keys")
            turns: list[dict[str, Any]] = []
            assert await ask(one, body(**FIRST)) == ("worse", None)
            for number, gateway in enumerate((two, one, one, two, two, one), start=1):

                def written(expected: int = number) -> bool:
                    # Beside the session stands the turn of the open call, by the call's id.
                    with volatile.client() as client:
                        values = [client.get(key) for key in client.keys("*session*")]
                    return (
                        max((len(json.loads(one)) for one in values if one), default=0) == expected
                    )

                await until(written, "the turn is in the store")
                turns = [*turns, *RESULTS[CHAT]]
                assert await ask(gateway, body(turns=turns)) == ("worse", "locked")
            volatile.hang()
            try:
                # This gateway answered the last turn; it needs no store.
                turns = [*turns, *RESULTS[CHAT]]
                assert (await ask(one, body(turns=turns)))[1] == "locked"
                # Without a session, but not without an answer.
                strange = json.loads(json.dumps(RESULTS[CHAT]).replace(CALL_ID, "call_8"))
                other = body(turns=strange, prompt_cache_key="new")
                assert await ask(two, other) == ("better", "released; why=unknown")
            finally:
                volatile.go_on()
