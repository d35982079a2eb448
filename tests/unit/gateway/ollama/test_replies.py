"""Answers of OpenAI's API become those of Ollama's, whole and as lines of a stream."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.engine_interface import Message
from service.gateway.ollama.replies import OllamaSend
from service.gateway.ollama.requests import CHAT, EMBED, EMBEDDINGS, GENERATE, TranslatedRequest

USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "coe": {"swap_ms": 1.5, "prefill_ms": 20, "decode_ms": 30},
}
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
CALL = {"id": "c1", "function": {"name": "f", "arguments": '{"n": 1}'}}
SHOWN_CALL = {"id": "c1", "function": {"name": "f", "arguments": {"n": 1}}}


async def sent(path: str, pieces: list[bytes], kind: bytes, status: int = 200) -> list[Message]:
    out: list[Message] = []

    async def send(message: Message) -> None:
        out.append(message)

    times = iter((1.0, 3.0, 3.0))
    request = TranslatedRequest("/v1/x", {}, "e", True, None)
    reply = OllamaSend(path, request, send, lambda: next(times))
    headers = [(b"content-type", kind), (b"content-length", b"1"), (b"x-coe-expert", b"e")]
    await reply({"type": "http.response.start", "status": status, "headers": headers})
    for i, piece in enumerate(pieces):
        more = i < len(pieces) - 1
        await reply({"type": "http.response.body", "body": piece, "more_body": more})
    assert (reply.expert, reply.status) == ("e", status)
    return out


async def whole(path: str, data: Any, status: int = 200) -> Any:
    body = orjson.dumps(data)
    head, last = await sent(path, [body[:5], body[5:]], b"application/json", status)
    assert dict(head["headers"])[b"content-length"] == str(len(last["body"])).encode()
    return orjson.loads(last["body"])


async def lines(path: str, raw: bytes, step: int = 10**6) -> list[Any]:
    pieces = [raw[i : i + step] for i in range(0, len(raw), step)]
    head, *rest = await sent(path, pieces, b"text/event-stream")
    headers = dict(head["headers"])
    assert headers[b"content-type"] == b"application/x-ndjson"
    assert b"content-length" not in headers
    assert not rest[-1].get("more_body", False)
    return [orjson.loads(line) for line in b"".join(m["body"] for m in rest).splitlines()]


def events(*given: Any) -> bytes:
    return b"".join(b"data: %s\n\n" % orjson.dumps(event) for event in given) + b"data: [DONE]\n\n"


def piece(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"model": "e", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


STREAM = events(
    piece(role="assistant", content=""),
    piece(reasoning="hm"),
    piece(content="Hel"),
    piece(content="lo", finish="length"),
    {"model": "e", "choices": [], "usage": USAGE},
)


async def test_whole_chat_has_message_counts_and_durations() -> None:
    choice = {"message": {"content": "Hello", "reasoning": "hm"}, "finish_reason": "length"}
    answer = await whole(CHAT, {"model": "e", "choices": [choice], "usage": USAGE})
    assert answer.pop("created_at").endswith("Z")
    assert answer == {
        "model": "e",
        "message": {"role": "assistant", "content": "Hello", "thinking": "hm"},
        "done": True,
        "done_reason": "length",
        "total_duration": 2 * 10**9,
        "load_duration": 1_500_000,
        "prompt_eval_count": 3,
        "prompt_eval_duration": 20 * 10**6,
        "eval_count": 2,
        "eval_duration": 30 * 10**6,
    }


async def test_whole_generate_has_its_text_of_chat_and_of_completions() -> None:
    for choice in ({"message": {"content": "Hello"}}, {"text": "Hello"}):
        answer = await whole(GENERATE, {"model": "e", "choices": [choice]})
        assert (answer["response"], answer["done"], answer["done_reason"]) == (
            "Hello",
            True,
            "stop",
        )


async def test_whole_chat_has_calls_with_objects_and_log_probabilities() -> None:
    content = [{"token": "a", "logprob": -1.0, "top_logprobs": []}]
    message = {"content": None, "tool_calls": [CALL]}
    choice = {"message": message, "logprobs": {"content": content}, "finish_reason": "tool_calls"}
    answer = await whole(CHAT, {"model": "e", "choices": [choice]})
    assert answer["message"] == {"role": "assistant", "content": "", "tool_calls": [SHOWN_CALL]}
    assert answer["logprobs"] == content


async def test_vectors_have_the_form_of_their_endpoint() -> None:
    data = [{"embedding": [0.5]}, {"embedding": [0.25]}]
    answer = await whole(EMBED, {"model": "e", "data": data, "usage": USAGE})
    assert answer["embeddings"] == [[0.5], [0.25]]
    assert answer["prompt_eval_count"] == 3
    assert await whole(EMBEDDINGS, {"data": data}) == {"embedding": [0.5]}


@pytest.mark.parametrize("data", [{"error": {"message": "why", "type": "x"}}, {}, [], "x"])
async def test_error_is_a_text(data: Any) -> None:
    answer = await whole(CHAT, data, 404)
    assert answer == {"error": "why" if data and "error" in data else "the request failed"}


@given(st.integers(1, 400))
async def test_stream_is_the_same_lines_however_it_is_cut(step: int) -> None:
    found = await lines(CHAT, STREAM, step)
    said = [line["message"] for line in found]
    assert [one.get("thinking") for one in said] == ["hm", None, None, None]
    assert [one["content"] for one in said] == ["", "Hel", "lo", ""]
    assert [line["done"] for line in found] == [False, False, False, True]
    assert (found[-1]["done_reason"], found[-1]["eval_count"]) == ("length", 2)


async def test_stream_of_generate_has_responses() -> None:
    found = await lines(GENERATE, STREAM)
    assert [line["response"] for line in found] == ["", "Hel", "lo", ""]
    texts = [{"model": "e", "choices": [{"text": text}]} for text in ("a", "b")]
    end = {"model": "e", "choices": [{"text": "", "finish_reason": "stop"}]}
    found = await lines(GENERATE, events(*texts, end))
    assert [line["response"] for line in found] == ["a", "b", ""]


async def test_stream_sends_a_call_in_one_piece() -> None:
    calls = [
        {"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"n"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "c2", "function": {"name": "g", "arguments": ""}},
    ]
    given = [piece(tool_calls=[call]) for call in calls]
    call, end = await lines(CHAT, events(*given, piece(finish="tool_calls")))
    second = {"id": "c2", "function": {"name": "g", "arguments": {}}}
    assert call["message"]["tool_calls"] == [SHOWN_CALL, second]
    assert end["done"]


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (events(piece(content="a"), {"error": {"message": "died"}}), "died"),
        (b"data: %s\n\n" % orjson.dumps(piece(content="a")), "the answer broke off"),
    ],
)
async def test_stream_that_fails_ends_with_the_error_only(raw: bytes, error: str) -> None:
    first, last = await lines(CHAT, raw)
    assert first["message"]["content"] == "a"
    assert last == {"error": error}


def anything(names: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Anything, or an object whose fields have the values of these names or anything."""
    fields = {name: value | JSON for name, value in names.items()}
    return st.fixed_dictionaries({}, optional=fields) | JSON


FUNCTION = anything({"name": st.just("f"), "arguments": st.just('{"n": 1}')})
CALLS = st.lists(anything({"index": st.just(0), "function": FUNCTION}), max_size=2)
SAID = anything({"content": st.just("x"), "reasoning": st.just("hm"), "tool_calls": CALLS})
CHOICE = anything(
    {"message": SAID, "delta": SAID, "text": st.just("x"), "finish_reason": st.just("stop")}
    | {"logprobs": anything({"content": JSON})}
)
REPLY = anything(
    {"choices": st.lists(CHOICE, max_size=2), "usage": anything(dict.fromkeys(USAGE, JSON))}
    | {"data": st.lists(anything({"embedding": JSON}), max_size=2)}
)


def check_line(line: Any) -> None:
    if "error" in line:
        assert isinstance(line["error"], str)
        return
    message = line["message"]
    assert isinstance(message["content"], str)
    assert isinstance(message.get("thinking", ""), str)
    for call in message.get("tool_calls", ()):
        assert isinstance(call["function"]["name"], str)
        assert isinstance(call["function"]["arguments"], dict)


@settings(max_examples=60)
@given(REPLY)
async def test_reply_of_any_form_becomes_an_answer_or_one_error(reply: Any) -> None:
    body = orjson.dumps(reply)
    for path in (CHAT, EMBED):
        out: list[Message] = []

        async def send(message: Message, out: list[Message] = out) -> None:
            out.append(message)

        shown = OllamaSend(path, TranslatedRequest("/v1/x", {}, "e", False, None), send)
        headers = [(b"content-type", b"application/json")]
        await shown({"type": "http.response.start", "status": 200, "headers": headers})
        await shown({"type": "http.response.body", "body": body})
        answer = orjson.loads(out[1]["body"])
        assert (out[0]["status"] == 200) is ("error" not in answer)
        assert out[0]["status"] in (200, 502)
        if path == CHAT:
            check_line(answer)


@settings(max_examples=60)
@given(st.lists(REPLY, max_size=3))
async def test_stream_of_any_form_becomes_lines_with_one_end(replies: list[Any]) -> None:
    found = await lines(CHAT, events(*replies))
    for line in found:
        check_line(line)
    assert [line for line in found if line.get("done") or "error" in line][-1] == found[-1]


@pytest.mark.parametrize("levels", [1, 200, 300, 2000])
async def test_arguments_that_can_not_be_written_again_are_left_out(levels: int) -> None:
    written = '{"n":' + "[" * levels + "]" * levels + "}"
    call = {"index": 0, "id": "c1", "function": {"name": "f", "arguments": written}}
    answer = await whole(CHAT, {"choices": [{"message": {"tool_calls": [call]}}]})
    first = (await lines(CHAT, events(piece(tool_calls=[call]), piece(finish="tool_calls"))))[0]
    for shown in (answer, first):
        (made,) = shown["message"]["tool_calls"]
        assert made["function"]["name"] == "f"
        assert made["function"]["arguments"].keys() == ({"n"} if levels <= 200 else set())
