"""The usage meter: tokens of a request's calls, counted as its answer passes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.engine_interface import Message
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.usage_meter import UsageMeter

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


async def test_usage_meter_hidden_usage_still_tells_the_thinking() -> None:
    meter = UsageMeter(chat_request(stream=True, n=2))
    pieces = [
        event("a", {**counts(9, 4), "completion_tokens_details": {"reasoning_tokens": made}}, 1, i)
        for i, made in ((0, 1), (1, 2), (0, 3))
    ]
    assert b"usage" not in await metered(meter, pieces)
    assert meter.reasoning_tokens == 5
    assert UsageMeter(chat_request(stream=True)).reasoning_tokens is None


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"usage": {"prompt_tokens": 9, "total_tokens": 9}}, 9),
        ({"usage": {"total_tokens": 9}}, 9),
        ({"usage": {"tokens": 9}}, None),
        ({}, None),
    ],
)
async def test_usage_meter_an_endpoint_that_generates_nothing_has_no_answer_s_tokens(
    reply: dict[str, Any], tokens: int | None
) -> None:
    request = parse_request("/v1/rerank", b'{"query":"q","documents":["a"]}', {}, 1000)
    meter = UsageMeter(request)
    body = orjson.dumps({**reply, "results": [{"document": {"text": "a" * 400}}]})
    await metered(meter, [body], kind=b"application/json")
    assert meter.calls_made("e") == [("e", tokens or request.prompt_tokens, 0)]
