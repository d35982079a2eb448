"""The sends of a reply: usage in its place, tokens counted, errors in the client's dialect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.token_prices import Price
from service.engine.engine_interface import Message
from service.errors import EngineDeadError
from service.gateway.request_record import ExpertCall, RequestRecord
from service.gateway.response_send import ResponseSend
from service.http.error_formats import Dialect
from service.http.token_usage import reply_usage, token_counts, usage_of

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "model", "a", "response"]), inner, max_size=3)
    ),
    max_leaves=12,
)


class Client:
    """An ASGI send that keeps a whole reply."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.body += message.get("body", b"")


def passed(
    pieces: list[bytes],
    *,
    kind: bytes = b"text/event-stream",
    status: int = 200,
    dialect: Dialect = Dialect.CHAT,
    broken: bool = False,
) -> tuple[Client, ResponseSend]:
    """What the client gets of a reply in pieces."""

    async def run() -> tuple[Client, ResponseSend]:
        client = Client()
        reply = ResponseSend(client, [], RequestRecord(expert="e", recipe="e"), None, dialect)
        reply.expert_call = ExpertCall("e", Price(1, 1))
        reply.record.calls.append(reply.expert_call)
        headers = [(b"content-type", kind)]
        await reply({"type": "http.response.start", "status": status, "headers": headers})
        for piece in pieces:
            await reply({"type": "http.response.body", "body": piece, "more_body": True})
        if broken:
            await reply.break_off(EngineDeadError("the engine died"))
        else:
            await reply({"type": "http.response.body", "body": b""})
        return client, reply

    return asyncio.run(run())


STREAM = (
    b'data: {"id":"1","choices":[{"delta":{"content":"\\"usage\\":{}"}}]}\n\n'
    b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.mark.parametrize("at", range(1, len(STREAM)))
def test_response_send_stream_cut_anywhere_has_one_cost_entry(at: int) -> None:
    client, reply = passed([STREAM[:at], STREAM[at:]])
    lines = [line[6:] for line in client.body.split(b"\n") if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    usage = json.loads(lines[1])["usage"]
    assert usage.pop("coe")["expert"] == "e"
    assert usage == {"prompt_tokens": 7, "completion_tokens": 3}
    assert lines[0] == STREAM.split(b"\n")[0][6:]
    assert reply.expert_call is not None
    assert (reply.expert_call.prompt_tokens, reply.expert_call.completion_tokens) == (7, 3)
    assert reply.events == 2


@given(st.dictionaries(st.sampled_from(["a", "tools", "metadata", "output"]), json_values))
def test_reply_usage_finds_only_the_top_level_usage(given_fields: dict[str, Any]) -> None:
    own = {"prompt_tokens": 11, "completion_tokens": 4}
    for document in (
        {**given_fields, "usage": own},
        {"usage": own, **given_fields},
        {**given_fields, "usage": own, "user": None},
    ):
        body = orjson.dumps(document)
        found = reply_usage(body)
        assert found is not None
        assert json.loads(body[found.value : found.end]) == own
        assert (found.prompt_tokens, found.answer_tokens) == (11, 4)
        assert usage_of(document) is own
    assert usage_of(given_fields) is None
    # A nested one is none of ours, however it looks.
    assert reply_usage(orjson.dumps(given_fields)) is None


@given(json_values)
def test_response_send_whole_reply_changes_only_the_cost_entry(value: Any) -> None:
    document = {"tools": value, "usage": {"input_tokens": 1}, "metadata": value}
    client, _ = passed([orjson.dumps(document)], kind=b"application/json")
    completion = json.loads(client.body)
    assert completion["usage"].pop("coe")["expert"] == "e"
    assert completion == document


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("cut", [b"", b'data: {"half'])
def test_response_send_broken_stream_ends_with_one_error_event(
    dialect: Dialect, cut: bytes
) -> None:
    created = (
        b"event: response.created\n"
        b'data: {"type":"response.created","sequence_number":0,"response":{"id":"r"}}\n\n'
    )
    client, _ = passed([created, cut], dialect=dialect, broken=True)
    assert "half" not in client.body.decode()
    events = [part for part in client.body.decode().split("\n\n") if part]
    if dialect is Dialect.OLLAMA:
        assert json.loads(events[-1]) == {"error": "the engine died"}
        return
    data = [json.loads(part.partition("data: ")[2]) for part in events]
    if dialect is Dialect.CHAT:
        assert data[-1]["error"]["code"] == "engine_dead"
    elif dialect is Dialect.MESSAGES:
        assert events[-1].startswith("event: error\n")
        assert data[-1]["error"] == {"type": "overloaded_error", "message": "the engine died"}
    else:
        assert [item["type"] for item in data] == ["response.created", "error", "response.failed"]
        assert data[1]["code"] == "engine_dead"
        assert data[2]["response"] == {
            "id": "r",
            "status": "failed",
            "error": {"code": "server_error", "message": "the engine died"},
        }
        assert [item["sequence_number"] for item in data] == [0, 1, 2]


@pytest.mark.parametrize("dialect", [Dialect.MESSAGES, Dialect.RESPONSES])
def test_response_send_pool_error_in_a_stream_is_translated(dialect: Dialect) -> None:
    first = b'event: x\ndata: {"type":"x"}\n\n'
    error = {"message": "gone", "type": "server_error", "param": None, "code": "engine_dead"}
    last = b"data: " + orjson.dumps({"error": error}) + b"\n\ndata: [DONE]\n\n"
    client, _ = passed([first, last], dialect=dialect)
    text = client.body.decode()
    assert text.startswith(first.decode())
    name, _, data = text[len(first) :].strip().partition("\ndata: ")
    assert name == "event: error"
    payload = json.loads(data)
    assert payload["type"] == "error"
    assert (payload.get("error") or payload)["message"] == "gone"
    assert "[DONE]" not in text


def test_response_send_engine_error_for_messages_is_translated() -> None:
    error = {"message": "too long", "type": "invalid_request_error", "param": None, "code": None}
    body = orjson.dumps({"error": error})
    client, _ = passed([body], kind=b"application/json", status=400, dialect=Dialect.MESSAGES)
    assert json.loads(client.body) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "too long"},
    }
    client, _ = passed([body], kind=b"application/json", status=400, dialect=Dialect.RESPONSES)
    assert client.body == body


def test_response_send_error_words_inside_content_are_no_errors() -> None:
    stream = (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":'
        b'"{\\"error\\": \\"[DONE]\\"}"},"input":{"error":{"message":"mine"}}}\n\n'
    )
    for dialect in Dialect:
        client, _ = passed([stream], dialect=dialect)
        assert client.body == stream


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, (1, 2)),
        ({"input_tokens": 1, "output_tokens": 2}, (1, 2)),
        ({"type": "object"}, (None, None)),
    ],
)
def test_token_counts_reads_openai_and_anthropic_names(
    usage: dict[str, Any], counts: tuple[int | None, int | None]
) -> None:
    assert token_counts(usage) == counts


@pytest.mark.parametrize(
    ("dialect", "event", "local", "outcome"),
    [
        (Dialect.CHAT, {"error": {"message": "m", "code": "engine_dead"}}, True, "engine_dead"),
        (Dialect.CHAT, {"error": {"message": "m", "code": 500}}, True, "internal_error"),
        (Dialect.CHAT, {"error": {"message": "m", "code": "x"}}, False, "upstream_error"),
        (
            Dialect.MESSAGES,
            {"type": "error", "error": {"type": "internal_error", "message": "m"}},
            True,
            "internal_error",
        ),
        (Dialect.RESPONSES, {"type": "error", "code": "x"}, False, "upstream_error"),
        (
            Dialect.RESPONSES,
            {"type": "response.failed", "response": {"error": {"code": "server_error"}}},
            True,
            "internal_error",
        ),
        (Dialect.CHAT, {"choices": [], "x": {"error": {"message": "mine"}}}, True, "ok"),
        (Dialect.RESPONSES, {"type": "x", "response": {"error": None}}, True, "ok"),
    ],
)
def test_response_send_error_event_in_a_stream_sets_the_outcome(
    dialect: Dialect, event: dict[str, Any], local: bool, outcome: str
) -> None:
    async def run() -> tuple[Client, RequestRecord]:
        client, record = Client(), RequestRecord(expert="e", recipe="e", local=local)
        reply = ResponseSend(client, [], record, None, dialect)
        headers = [(b"content-type", b"text/event-stream")]
        await reply({"type": "http.response.start", "status": 200, "headers": headers})
        body = b"data: " + orjson.dumps(event) + b"\n\ndata: [DONE]\n\n"
        await reply({"type": "http.response.body", "body": body})
        return client, record

    client, record = asyncio.run(run())
    assert record.outcome == outcome
    # An end that claims a whole answer follows none that failed.
    assert (b"[DONE]" in client.body) is (outcome == "ok" and dialect is Dialect.CHAT)


events = st.lists(
    st.dictionaries(
        st.sampled_from(["type", "error", "response", "message", "usage", "choices", "model"]),
        json_values | st.sampled_from(["error", "response.created", "response.failed"]),
    ),
    max_size=4,
)


@given(events, st.sampled_from(list(Dialect)), st.integers(0, 200))
def test_response_send_any_upstream_event_is_passed_on(
    told: list[Any], dialect: Dialect, at: int
) -> None:
    stream = b"".join(b"data: " + orjson.dumps(item) + b"\n\n" for item in told)
    client, _ = passed([stream[:at], stream[at:]], dialect=dialect)
    got = [json.loads(line[6:]) for line in client.body.split(b"\n") if line.startswith(b"data: ")]
    for item, original in zip(got, told, strict=False):
        if isinstance(original.get("error"), dict) and "type" not in original:
            break  # an error, translated: what follows it counts anew
        for holder in (item, item.get("response"), item.get("message")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                holder["usage"].pop("coe", None)
                break
        for holder in (original, original.get("response"), original.get("message")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                holder["usage"].pop("coe", None)
                break
        assert item == original


def test_response_send_tells_the_thinking_of_whole_answers_and_streams() -> None:
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    whole = orjson.dumps({"choices": [], "usage": usage})
    for body, kind in ((whole, b"application/json"), (b"data: " + whole + b"\n\n", b"")):
        client, reply = passed([body], kind=kind or b"text/event-stream")
        assert reply.expert_call is not None
        assert reply.expert_call.reasoning_tokens == 2
        told = json.loads(client.body.removeprefix(b"data: "))["usage"]
        assert told["completion_tokens_details"] == {"reasoning_tokens": 2}
        assert told["coe"]["calls"][0]["reasoning_tokens"] == 2
