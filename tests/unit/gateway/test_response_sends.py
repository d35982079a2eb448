"""The sends of a reply: usage in its place, tokens counted, errors in the client's dialect."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.token_prices import Price
from service.engine.engine_interface import Message
from service.errors import EngineDeadError
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import ExpertCall, RequestRecord
from service.gateway.response_sends import ResponseSend, UsageMeter
from service.http.openai_errors import Dialect
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
    events = [part for part in client.body.decode().split("\n\n") if part]
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
    assert "half" not in client.body.decode()


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


CHAT = "/v1/chat/completions"


def chat_request(path: str = CHAT, **more: Any) -> InferenceRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], "input": "x", "prompt": "y", **more}
    return parse_request(path, orjson.dumps(body), {}, 1000)


def event(content: str, usage: Any = ..., choices: int = 1, index: int = 0) -> bytes:
    data: dict[str, Any] = {"id": "1", "choices": [{"index": index, "delta": {"content": content}}]}
    if not choices:
        data["choices"] = []
    if usage is not ...:
        data["usage"] = usage
    return b"data: " + orjson.dumps(data) + b"\n\n"


def counts(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def metered(
    meter: UsageMeter, pieces: list[bytes], *, kind: bytes = b"text/event-stream", ends: bool = True
) -> bytes:
    out: list[bytes] = []

    async def send(message: Message) -> None:
        out.append(message.get("body", b""))

    counted = meter.wrap(send)
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
    await counted(head)
    for piece in pieces:
        await counted({"type": "http.response.body", "body": piece, "more_body": True})
    if ends:
        await counted({"type": "http.response.body", "body": b""})
    return b"".join(out)


METERED_STREAM = [
    event("a", counts(9, 1)),
    event('{"usage":{"prompt_tokens":99}}', counts(9, 2)),
    event("", counts(9, 2), choices=0),
    b"data: [DONE]\n\n",
]


async def test_usage_meter_stream_without_include_usage_hides_usage() -> None:
    meter = UsageMeter(chat_request(stream=True))
    out = await metered(meter, METERED_STREAM)
    assert out == event("a") + event('{"usage":{"prompt_tokens":99}}') + b"data: [DONE]\n\n"
    assert meter.calls_made("e") == [("e", 9, 2)]


async def test_usage_meter_stream_with_include_usage_keeps_the_last_chunk_s_only() -> None:
    meter = UsageMeter(chat_request(stream=True, stream_options={"include_usage": True}))
    out = await metered(meter, METERED_STREAM)
    assert (
        out
        == event("a")
        + event('{"usage":{"prompt_tokens":99}}')
        + METERED_STREAM[2]
        + METERED_STREAM[3]
    )


async def test_usage_meter_stream_with_continuous_usage_keeps_every_chunk_s() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert await metered(
        UsageMeter(chat_request(stream=True, stream_options=options)), METERED_STREAM
    ) == b"".join(METERED_STREAM)


@given(st.lists(st.integers(1, 400), max_size=6))
async def test_usage_meter_chunks_cut_anywhere_count_alike(cuts: list[int]) -> None:
    data = b"".join(METERED_STREAM)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[a:b] for a, b in itertools.pairwise(edges)]
    meter = UsageMeter(chat_request(stream=True))
    out = await metered(meter, pieces)
    assert out.replace(b"\n", b"") == (
        event("a") + event('{"usage":{"prompt_tokens":99}}') + b"data: [DONE]"
    ).replace(b"\n", b"")
    assert meter.calls_made("e") == [("e", 9, 2)]


async def test_usage_meter_aborted_stream_counts_tokens_sent() -> None:
    meter = UsageMeter(chat_request(stream=True, n=2))
    pieces = [event("a", counts(9, 1), index=0), event("b", counts(9, 1), index=1)]
    await metered(meter, [*pieces, event("c", counts(9, 2), index=0)], ends=False)
    assert meter.calls_made("e") == [("e", 9, 3)]


async def test_usage_meter_stream_without_usage_counts_chunks() -> None:
    meter = UsageMeter(chat_request(stream=True))
    await metered(meter, [event("a"), event("b")], ends=False)
    ((expert, prompt, completion),) = meter.calls_made("e")
    assert (expert, completion) == ("e", 2)
    assert prompt > 0


@pytest.mark.parametrize(
    ("path", "usage"),
    [
        (CHAT, {"prompt_tokens": 3, "completion_tokens": 4}),
        ("/v1/responses", {"input_tokens": 3, "input_tokens_details": {}, "output_tokens": 4}),
        ("/v1/messages", {"input_tokens": 3, "output_tokens": 4}),
    ],
)
async def test_usage_meter_whole_reply_is_unchanged_and_counted(path: str, usage: Any) -> None:
    body = orjson.dumps({"id": "1", "usage": usage, "text": '"usage":{"input_tokens":9}'})
    meter = UsageMeter(chat_request(path))
    assert await metered(meter, [body], kind=b"application/json") == body
    assert meter.calls_made("e") == [("e", 3, 4)]


async def test_usage_meter_anthropic_stream_is_unchanged_and_counted() -> None:
    data = (
        b'event: message_start\ndata: {"message":{"usage":{"input_tokens":7,"output_tokens":0}}}'
        b'\n\nevent: message_delta\ndata: {"delta":{},"usage":{"output_tokens":5}}\n\n'
    )
    meter = UsageMeter(chat_request("/v1/messages", stream=True))
    assert await metered(meter, [data]) == data
    assert meter.calls_made("e") == [("e", 7, 5)]


async def test_usage_meter_adds_the_calls_of_a_recipe() -> None:
    meter = UsageMeter(chat_request())
    meter.add("a", 10, 2)
    await metered(meter, [b'{"usage":{"prompt_tokens":1,"completion_tokens":1}}'], kind=b"x")
    assert meter.calls_made("b") == [("a", 10, 2), ("b", 1, 1)]


def test_usage_meter_requests_usage_from_the_engine_for_streams() -> None:
    data = chat_request(stream=True).data
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert UsageMeter(chat_request(stream=True)).asks(data)["stream_options"] == options
    assert UsageMeter(chat_request()).asks(data) is data
    assert UsageMeter(chat_request("/v1/messages", stream=True)).asks(data) is data


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": "), (" , ", " : ")])
async def test_usage_meter_json_with_any_whitespace_is_counted(separators: tuple[str, str]) -> None:
    deep = {**counts(7, 3), "more": {"a": {"b": {"c": [1]}}}}
    body = json.dumps({"usage": deep, "choices": []}, separators=separators).encode()
    meter = UsageMeter(chat_request())
    assert await metered(meter, [body], kind=b"application/json") == body
    assert meter.calls_made("e") == [("e", 7, 3)]
    result = json.dumps({"id": 1, "usage": deep, "choices": [{"index": 0}]}, separators=separators)
    meter = UsageMeter(chat_request(stream=True))
    out = await metered(meter, [b"data: " + result.encode() + b"\n\n"])
    assert json.loads(out[6:]) == {"id": 1, "choices": [{"index": 0}]}
    assert meter.calls_made("e") == [("e", 7, 3)]


async def test_usage_meter_reply_without_usage_counts_by_size() -> None:
    meter = UsageMeter(chat_request())
    await metered(meter, [b'{"choices": ["' + b"x" * 400 + b'"]}'], kind=b"application/json")
    ((_, prompt, completion),) = meter.calls_made("e")
    assert prompt > 0
    assert completion > 90


def typed(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\n".encode() + b"data: " + orjson.dumps({"type": kind, **data}) + b"\n\n"


_MESSAGE = [
    typed("message_start", message={"id": "x", "usage": {"input_tokens": 9, "output_tokens": 1}}),
    typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    *[typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "tok "})] * 40,
    typed("content_block_stop", index=0),
    typed("message_delta", delta={}, usage={"input_tokens": 9, "output_tokens": 37}),
    typed("message_stop"),
]
_RESPONSE = [
    typed("response.created", response={"id": "x", "usage": None}),
    typed("response.output_item.added", output_index=0, item={}),
    *[typed("response.output_text.delta", delta="tok ")] * 40,
    typed("response.output_text.done", text="tok " * 40),
    typed("response.completed", response={"usage": {"input_tokens": 9, "output_tokens": 37}}),
]


@pytest.mark.parametrize(
    ("path", "pieces", "sent", "used"),
    [
        ("/v1/messages", _MESSAGE, 2, (9, 1)),
        ("/v1/messages", _MESSAGE, 12, (9, 11)),
        ("/v1/messages", _MESSAGE, 42, (9, 41)),
        ("/v1/messages", _MESSAGE, len(_MESSAGE), (9, 37)),
        ("/v1/responses", _RESPONSE, 2, (..., 0)),
        ("/v1/responses", _RESPONSE, 12, (..., 10)),
        ("/v1/responses", _RESPONSE, 42, (..., 40)),
        ("/v1/responses", _RESPONSE, len(_RESPONSE), (9, 37)),
    ],
)
async def test_usage_meter_stream_with_usage_at_the_end_is_counted_as_it_goes(
    path: str, pieces: list[bytes], sent: int, used: tuple[Any, int]
) -> None:
    request = chat_request(path, stream=True)
    meter = UsageMeter(request)
    await metered(meter, pieces[:sent], ends=False)
    ((expert, prompt, completion),) = meter.calls_made("big")
    assert (expert, completion) == ("big", used[1])
    assert prompt == (request.prompt_tokens if used[0] is ... else used[0])


@pytest.mark.parametrize(
    ("sent", "told", "counted", "used"),
    [
        # Nothing has gone out: the engine's count, or else the guess.
        (None, (12, 300), True, (12, 300)),
        (None, (12, 300), False, (12, 300)),
        # A stream: the engine had made more than what went out; a guess gives way to that.
        (12, (9, 25), True, (9, 25)),
        (12, (9, 999), False, (9, 11)),
    ],
)
async def test_usage_meter_aborted_request_counts_the_engine_s_figure_or_what_was_sent(
    sent: int | None, told: tuple[int, int], counted: bool, used: tuple[int, int]
) -> None:
    meter = UsageMeter(chat_request("/v1/messages", stream=True))
    if sent is not None:
        await metered(meter, _MESSAGE[:sent], ends=False)
    meter.abandon(*told, counted)
    assert meter.calls_made("big") == [("big", *used)]


_SCHEMA = {"type": "object", "properties": {"usage": {"input_tokens": 10**6, "type": "object"}}}
_OWN = {"usage": {"prompt_tokens": 10**6, "completion_tokens": 10**6}}


@pytest.mark.parametrize("leaves", [False, True])
async def test_usage_meter_ignores_usage_fields_of_the_user_in_events(leaves: bool) -> None:
    fields = {"tools": [{"name": "f", "parameters": _SCHEMA}], "metadata": _OWN}
    stream = [
        typed("response.created", response={**fields, "usage": None}),
        *[typed("response.output_text.delta", delta="tok ")] * 5,
        typed(
            "response.completed",
            response={**fields, "usage": {"input_tokens": 9, "output_tokens": 5}},
        ),
    ]
    meter = UsageMeter(chat_request("/v1/responses", stream=True))
    given = stream[:-1] if leaves else stream
    assert await metered(meter, given, ends=not leaves) == b"".join(given)
    ((_, prompt, completion),) = meter.calls_made("e")
    # Left before any was told, the prompt counts by its size, and the answer by its pieces.
    assert (prompt, completion) == (
        (chat_request("/v1/responses", stream=True).prompt_tokens, 5) if leaves else (9, 5)
    )


async def test_usage_meter_ignores_usage_fields_of_the_user_in_a_whole_reply() -> None:
    body = orjson.dumps(
        {"tools": [_SCHEMA], "metadata": _OWN, "usage": {"input_tokens": 9, "output_tokens": 5}}
    )
    meter = UsageMeter(chat_request("/v1/responses"))
    assert await metered(meter, [body], kind=b"application/json") == body
    assert meter.calls_made("e") == [("e", 9, 5)]


async def test_usage_meter_hides_only_the_chunk_s_own_usage() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"extra": _OWN}}], "usage": counts(9, 1)}
    meter = UsageMeter(chat_request(stream=True))
    out = await metered(meter, [b"data: " + orjson.dumps(chunk) + b"\n\n"])
    assert json.loads(out[6:]) == {"choices": chunk["choices"]}
    assert meter.calls_made("e") == [("e", 9, 1)]


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": 9}, {"completion_tokens": -1}])
async def test_usage_meter_usage_without_the_answer_s_tokens_counts_what_passes(usage: Any) -> None:
    meter = UsageMeter(chat_request(stream=True))
    await metered(meter, [event("a"), event("b"), event("", usage, choices=0)])
    ((_, _, completion),) = meter.calls_made("e")
    assert completion >= 2
    whole = UsageMeter(chat_request())
    body = orjson.dumps({"choices": [{"message": {"content": "a" * 400}}], "usage": usage})
    await metered(whole, [body], kind=b"application/json")
    ((_, _, completion),) = whole.calls_made("e")
    assert completion >= 100
