"""Errors in the shape of each API, and replies in which only our own fields change."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.http.asgi_helpers import read_body
from tests.support.in_process_service import RunningGateway, chat, run_gateway, serving, simulated

MESSAGES, RESPONSES, CHAT = "/v1/messages", "/v1/responses", "/v1/chat/completions"
# What is the user's own, under names that we look for.
OWN = {"model": "T-800", "usage": {"kwh": 3}, "note": 'say "model":"x", "usage":{"a":1}'}
TOOL = {
    "type": "function",
    "name": "meter",
    "parameters": {"type": "object", "properties": {"usage": {"type": "object"}, "model": OWN}},
}
COUNTS = {"input_tokens": 10, "output_tokens": 5}


def event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def messages(body: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    tool = {"type": "tool_use", "id": "t", "name": "meter", "input": OWN}
    head = {"id": "m", "type": "message", "role": "assistant", "model": body["model"]}
    whole = {**head, "content": [tool], "stop_reason": "tool_use", "usage": COUNTS}
    return whole, [
        event({"type": "message_start", "message": {**head, "usage": {"input_tokens": 10}}}),
        event({"type": "content_block_start", "index": 0, "content_block": tool}),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": COUNTS}),
        event({"type": "message_stop"}),
    ]


def responses(body: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    whole = {
        "id": "r",
        "object": "response",
        "status": "completed",
        "model": body["model"],
        "tools": [TOOL],
        "usage": {**COUNTS, "total_tokens": 15},
        "metadata": OWN,
    }
    created = {**whole, "status": "in_progress", "usage": None}
    return whole, [
        event({"type": "response.created", "sequence_number": 0, "response": created}),
        event({"type": "response.output_text.delta", "sequence_number": 1, "delta": "hi"}),
        event({"type": "response.completed", "sequence_number": 2, "response": whole}),
    ]


def completions(body: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    call = {"id": "t", "function": {"name": "meter", "arguments": json.dumps(OWN)}}
    head = {"id": "c", "model": body["model"], "metadata": OWN}
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    whole = {**head, "choices": [{"index": 0, "message": {"tool_calls": [call]}}], "usage": usage}
    chunk = {**head, "choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
    last = {**head, "choices": [], "usage": usage}
    return whole, [
        *(f"data: {json.dumps(item)}\n\n".encode() for item in (chunk, chunk, last)),
        b"data: [DONE]\n\n",
    ]


MADE = {MESSAGES: messages, RESPONSES: responses, CHAT: completions}


async def upstream(scope: Any, receive: Any, send: Any) -> None:
    """Answers in the API that it is asked in; `metadata.end` says how."""
    body = json.loads(await read_body(receive, 10**6))
    whole, parts = MADE[scope["path"]](body)
    end = (body.get("metadata") or {}).get("end")
    kind = b"text/event-stream" if body.get("stream") and end != "refuse" else b"application/json"
    status = 400 if end == "refuse" else 200
    head = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]}
    await send(head)
    if end == "refuse":
        fields = {"error": {"message": "upstream says no", "param": "n", "code": None}}
        await send({"type": "http.response.body", "body": json.dumps(fields).encode()})
        return
    if not body.get("stream"):
        await send({"type": "http.response.body", "body": json.dumps(whole).encode()})
        return
    for part in parts[:2] if end == "cut" else parts:
        # In two pieces: networks cut where they like.
        for piece in (part[:25], part[25:]):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    if end == "cut":
        await send({"type": "http.response.body", "body": b'data: {"ty', "more_body": True})
        raise ConnectionResetError
    await send({"type": "http.response.body", "body": b""})


@asynccontextmanager
async def remote() -> AsyncIterator[RunningGateway]:
    async with serving(upstream) as served:
        config = simulated(
            {"cpu": {"tokens": 2}},
            experts={
                "general": {"model": "m"},
                "far": {"remote": {"url": served.url + "/v1", "model": "theirs"}},
            },
            server={"max_body_bytes": 2_000},
        )
        async with run_gateway(config) as s:
            yield s


def body_of(path: str, **more: Any) -> dict[str, Any]:
    body = chat(model="far", max_tokens=5) if path != RESPONSES else {"model": "far", "input": "x"}
    return {**body, **more}


async def stream(s: RunningGateway, path: str, **more: Any) -> list[tuple[str, Any]]:
    """Every event as (name, data)."""
    async with s.post(body_of(path, stream=True, **more), path) as reply:
        assert reply.status == 200
        text = (await reply.read()).decode()
    found, name = [], ""
    for line in text.split("\n"):
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            data = line[6:]
            found.append((name, data if data == "[DONE]" else json.loads(data)))
            name = ""
    return found


@pytest.mark.parametrize("path", MADE)
async def test_whole_reply_is_changed_only_in_its_own_model_and_usage(path: str) -> None:
    async with remote() as s:
        status, _, answer = await s.ask(body_of(path), path)
    given, _ = MADE[path]({"model": "theirs"})
    assert status == 200
    assert answer.pop("model") == "far"
    assert answer["usage"].pop("coe")["expert"] == "far"
    given.pop("model")
    assert answer == given


@pytest.mark.parametrize("path", MADE)
async def test_stream_is_changed_only_in_its_own_model_and_usage(path: str) -> None:
    async with remote() as s:
        received = await stream(s, path, stream_options={"include_usage": True})
    _, parts = MADE[path]({"model": "far"})
    given = [part.split(b"data: ")[1].strip() for part in parts]
    costs = 0
    for (_, data), expected in zip(received, given, strict=True):
        if data == "[DONE]":
            assert (path, expected) == (CHAT, b"[DONE]")
            continue
        for holder in (data, data.get("response") or {}):
            if isinstance(holder.get("usage"), dict) and "coe" in holder["usage"]:
                assert holder["usage"].pop("coe")["expert"] == "far"
                costs += 1
        assert data == json.loads(expected)
    assert costs == 1


@pytest.mark.parametrize("path", MADE)
async def test_upstream_failure_is_reported_in_the_client_s_dialect(path: str) -> None:
    async with remote() as s:
        received = await stream(s, path, metadata={"end": "cut"})
        assert (await s.ask(body_of(path), path))[0] == 200
    assert "[DONE]" not in [data for _, data in received]
    name, last = received[-1]
    if path == CHAT:
        assert last["error"]["code"] == "upstream_error"
    elif path == MESSAGES:
        assert (name, last["type"]) == ("error", "error")
        assert last["error"].keys() == {"type", "message"}
        assert "message_stop" not in [data["type"] for _, data in received]
    else:
        error = received[-2][1]
        assert (received[-2][0], error["type"], error["code"]) == (
            "error",
            "error",
            "upstream_error",
        )
        assert (name, last["type"], last["response"]["status"]) == (
            "response.failed",
            "response.failed",
            "failed",
        )
        assert last["response"]["error"]["message"] == error["message"]
        assert [data["sequence_number"] for _, data in received] == [0, 1, 2, 3]


async def test_endpoint_that_no_engine_has_is_a_404_in_anthropic_s_shape() -> None:
    async with remote() as s:
        status, _, answer = await s.ask(chat(), MESSAGES + "/count_tokens")
    assert (status, answer["type"], answer["error"]["type"]) == (404, "error", "not_found_error")


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_simulated_answer_has_the_same_text_and_usage_whole_and_streamed(path: str) -> None:
    async with remote() as s:
        _, headers, answer = await s.ask(body_of(path, model="general"), path)
        events = [data for _, data in await stream(s, path, model="general")]
    (item,) = answer["output"] if path == RESPONSES else [answer]
    text = "".join(part["text"] for part in item["content"])
    last = events[-1]["response"] if path == RESPONSES else events[-2]
    pieces = [event["delta"] for event in events if event["type"].endswith("delta")]
    if path == MESSAGES:
        pieces = [piece["text"] for piece in pieces if "text" in piece]
    assert "".join(pieces) == text
    assert text.startswith("general:")
    assert headers["x-coe-expert"] == answer["model"] == "general"
    for usage in (answer["usage"], last["usage"]):
        cost = usage.pop("coe")
        assert (cost["expert"], usage["output_tokens"]) == ("general", len(pieces))
    assert answer["usage"] == last["usage"]


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
async def test_engine_death_ends_a_simulated_stream_in_the_client_s_dialect(path: str) -> None:
    config = simulated({"cpu": {"tokens": 5, "decode_ms": 5, "fail": "mid_stream"}})
    async with run_gateway(config) as s:
        received = await stream(s, path, model="general")
    kinds = [data["type"] for _, data in received]
    if path == MESSAGES:
        assert kinds[-1] == "error"
        assert "message_stop" not in kinds
    else:
        assert kinds[-2:] == ["error", "response.failed"]
        assert [data["sequence_number"] for _, data in received] == list(range(len(received)))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"model": "nobody"}, 404, "not_found_error"),
        ({"messages": None}, 400, "invalid_request_error"),
        ({"messages": 3}, 400, "invalid_request_error"),
        ({"chat_template": "x"}, 400, "invalid_request_error"),
        ({"metadata": {"end": "refuse"}}, 400, "invalid_request_error"),
    ],
)
async def test_messages_errors_have_anthropic_s_shape(
    change: dict[str, Any], status: int, kind: str, streamed: bool
) -> None:
    async with remote() as s:
        got, headers, answer = await s.ask(body_of(MESSAGES, stream=streamed, **change), MESSAGES)
    assert (got, answer["type"], answer["error"]["type"]) == (status, "error", kind)
    assert answer["error"]["message"]
    assert answer["error"].keys() == {"type", "message"}
    assert int(headers["content-length"]) == len(json.dumps(answer, separators=(",", ":")))


async def test_messages_errors_before_parsing_have_anthropic_s_shape() -> None:
    json_type = {"content-type": "application/json"}
    async with remote() as s:
        tries = [
            ("POST", b"{nonsense", json_type, 400, "invalid_request_error"),
            ("POST", b"{}", {"content-type": "text/plain"}, 415, "invalid_request_error"),
            ("POST", b"{}", {**json_type, "host": "a.example"}, 403, "permission_error"),
            ("POST", b"x" * 3_000, json_type, 413, "request_too_large"),
            ("GET", None, {}, 405, "invalid_request_error"),
        ]
        for method, data, headers, status, kind in tries:
            async with s.client.request(
                method, s.url + MESSAGES, data=data, headers=headers
            ) as reply:
                payload = await reply.json()
                assert (reply.status, payload["type"], payload["error"]["type"]) == (
                    status,
                    "error",
                    kind,
                )


async def test_hosted_tools_are_removed_and_named() -> None:
    async with remote() as s:
        tools = [{"type": "web_search"}, TOOL, {"type": "web_search"}]
        status, headers, _ = await s.ask(body_of(RESPONSES, tools=tools), RESPONSES)
        assert (status, headers["x-coe-tools-left-out"]) == (200, "web_search")
        status, headers, _ = await s.ask(body_of(RESPONSES, tools=[TOOL]), RESPONSES)
        assert (status, "x-coe-tools-left-out" in headers) == (200, False)
