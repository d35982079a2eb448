"""Requests of Ollama's API become those of OpenAI's, field by field; others are refused."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.errors import InvalidRequestError
from service.gateway.ollama.requests import (
    CHAT,
    EMBED,
    EMBEDDINGS,
    GENERATE,
    TranslatedRequest,
    duration_s,
    translated,
)

HELLO = [{"role": "user", "content": "hello"}]
KNOWN = frozenset({"general", "tagged:latest"})
PNG = "iVBORw0KGgo="


def translate(path: str, **data: Any) -> TranslatedRequest:
    return translated(path, orjson.dumps({"model": "general", **data}), KNOWN)


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ({"options": {"num_predict": 7}}, {"max_tokens": 7}),
        ({"options": {"num_predict": -1}}, {}),
        (
            {"options": {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 4}},
            {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 4},
        ),
        (
            {"options": {"stop": ["a"], "repeat_penalty": 1.1}},
            {"stop": ["a"], "repetition_penalty": 1.1},
        ),
        (
            {"options": {"presence_penalty": 1, "frequency_penalty": 2}},
            {"presence_penalty": 1, "frequency_penalty": 2},
        ),
        ({"options": {"num_ctx": 4096, "num_gpu": 1, "use_mmap": True, "seed": None}}, {}),
        ({"options": {"mirostat": 0, "mirostat_tau": 5.0, "tfs_z": 1.0, "typical_p": 1}}, {}),
        ({"format": "json"}, {"response_format": {"type": "json_object"}}),
        ({"format": ""}, {}),
        (
            {"format": {"type": "object"}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ({"think": True}, {"enable_thinking": True}),
        ({"think": False}, {"enable_thinking": False}),
        ({"think": "high"}, {"reasoning_effort": "high"}),
        ({"tools": [{"type": "function"}]}, {"tools": [{"type": "function"}]}),
        ({"tools": [], "options": None}, {}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"coe": {"max_cost": 1}}, {"coe": {"max_cost": 1}}),
    ],
)
def test_chat_fields_become_openai_s(data: dict[str, Any], fields: dict[str, Any]) -> None:
    request = translate(CHAT, messages=HELLO, stream=False, **data)
    assert request.path == "/v1/chat/completions"
    assert request.body == {"model": "general", "messages": HELLO, **fields}


@pytest.mark.parametrize(
    ("path", "data", "param"),
    [
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": ["hi"]}, "messages[0]"),
        (CHAT, {"messages": HELLO, "stream": 1}, "stream"),
        (CHAT, {"messages": HELLO, "prompt": "x"}, "prompt"),
        (CHAT, {"messages": HELLO, "options": []}, "options"),
        (CHAT, {"messages": HELLO, "options": {"num_predict": 0}}, "options.num_predict"),
        (CHAT, {"messages": HELLO, "options": {"num_predict": 1.5}}, "options.num_predict"),
        (CHAT, {"messages": HELLO, "options": {"mirostat": 1}}, "options.mirostat"),
        (CHAT, {"messages": HELLO, "options": {"tfs_z": 0.5}}, "options.tfs_z"),
        (CHAT, {"messages": HELLO, "options": {"warmth": 1}}, "options.warmth"),
        (CHAT, {"messages": HELLO, "format": "xml"}, "format"),
        (CHAT, {"messages": HELLO, "think": "hard"}, "think"),
        (CHAT, {"messages": HELLO, "keep_alive": "soon"}, "keep_alive"),
        (CHAT, {"messages": [{"role": "user", "images": ["?"]}]}, "images"),
        (CHAT, {"messages": [{"role": "user", "images": 3}]}, "images"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0]"),
        (GENERATE, {"prompt": "x", "suffix": "y"}, "suffix"),
        (GENERATE, {"prompt": "x", "context": [1]}, "context"),
        (GENERATE, {"prompt": "x", "template": "y"}, "template"),
        (GENERATE, {"prompt": ["x"]}, "prompt"),
        (GENERATE, {"prompt": "x", "raw": True, "system": "y"}, "raw"),
        (GENERATE, {"prompt": "x", "raw": True, "logprobs": True}, "logprobs"),
        (EMBED, {}, "input"),
        (EMBED, {"input": []}, "input"),
        (EMBEDDINGS, {"input": "x"}, "input"),
        (EMBED, {"input": "x", "model": ""}, "model"),
    ],
)
def test_what_there_is_not_here_is_refused_by_its_name(
    path: str, data: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        translate(path, **data)
    assert caught.value.param == param


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"null"])
def test_body_that_is_no_object_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        translated(CHAT, raw, KNOWN)


@pytest.mark.parametrize(
    ("given", "model"),
    [
        ("general", "general"),
        ("general:latest", "general"),
        ("tagged:latest", "tagged:latest"),
        ("auto:fast", "auto:fast"),
        ("auto:latest", "auto"),
        ("nobody:latest", "nobody"),
    ],
)
def test_tag_latest_is_left_out_where_no_name_has_it(given: str, model: str) -> None:
    assert translate(CHAT, model=given, messages=HELLO).model == model


def test_stream_is_usual_and_asks_for_the_usage() -> None:
    request = translate(CHAT, messages=HELLO)
    assert request.stream
    assert request.body["stream_options"] == {"include_usage": True}
    assert not translate(CHAT, messages=HELLO, stream=False).stream


def test_images_become_parts_of_their_type() -> None:
    message = {"role": "user", "content": "see", "images": [PNG, "/9j/4AAQ"]}
    (made,) = translate(CHAT, messages=[message]).body["messages"]
    assert [part["type"] for part in made["content"]] == ["text", "image_url", "image_url"]
    urls = [part["image_url"]["url"] for part in made["content"][1:]]
    assert urls == [f"data:image/png;base64,{PNG}", "data:image/jpeg;base64,/9j/4AAQ"]


def test_calls_get_ids_that_their_results_name() -> None:
    def called(*names: str) -> dict[str, Any]:
        calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in names]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def result(**more: Any) -> dict[str, Any]:
        return {"role": "tool", "content": "r", **more}

    messages = [
        called("f", "g", "f"),
        *(result(tool_name=name) for name in ("g", "f", "f")),
        called("h"),
        result(),
    ]
    sent = translate(CHAT, messages=messages).body["messages"]
    ids = [[call["id"] for call in sent[i]["tool_calls"]] for i in (0, 4)]
    assert len({*ids[0], *ids[1]}) == 4
    assert sent[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"n":1}'}
    assert [sent[i]["tool_call_id"] for i in (1, 2, 3)] == [ids[0][1], ids[0][0], ids[0][2]]
    assert sent[5]["tool_call_id"] == ids[1][0]


def test_generate_is_a_chat_and_raw_a_completion() -> None:
    request = translate(GENERATE, prompt="hello", system="brief", stream=False)
    assert request.body["messages"] == [{"role": "system", "content": "brief"}, *HELLO]
    raw = translate(GENERATE, prompt="hello", raw=True, stream=False)
    assert (raw.path, raw.body["prompt"]) == ("/v1/completions", "hello")


@pytest.mark.parametrize(
    ("path", "data", "asks"),
    [
        (CHAT, {}, False),
        (CHAT, {"messages": []}, False),
        (CHAT, {"messages": HELLO}, True),
        (GENERATE, {}, False),
        (GENERATE, {"prompt": "", "keep_alive": 0}, False),
        (GENERATE, {"prompt": "x"}, True),
    ],
)
def test_request_without_a_prompt_asks_nothing(path: str, data: dict[str, Any], asks: bool) -> None:
    assert translate(path, **data).asks is asks


@pytest.mark.parametrize(
    ("path", "data", "fields"),
    [
        (EMBED, {"input": "x"}, {"input": "x"}),
        (EMBED, {"input": ["x"], "dimensions": 8}, {"input": ["x"], "dimensions": 8}),
        (EMBED, {"input": "x", "truncate": True}, {"input": "x", "truncate_prompt_tokens": -1}),
        (EMBED, {"input": "x", "truncate": False}, {"input": "x"}),
        (EMBEDDINGS, {"prompt": "x"}, {"input": "x"}),
    ],
)
def test_embed_fields_become_openai_s(
    path: str, data: dict[str, Any], fields: dict[str, Any]
) -> None:
    request = translate(path, **data)
    assert (request.path, request.stream) == ("/v1/embeddings", False)
    assert request.body == {"model": "general", **fields}


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (None, None),
        (0, 0),
        ("0", 0),
        ("0s", 0),
        (-1, -1),
        ("-1m", -60),
        (2.5, 2.5),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("300ms", 0.3),
        ("24h", 86_400),
    ],
)
def test_duration_is_read_as_go_does(given: object, seconds: float | None) -> None:
    assert duration_s(given) == pytest.approx(seconds) if seconds else duration_s(given) == seconds
    if given is not None:
        assert translate(CHAT, messages=HELLO, keep_alive=given).unloads is (seconds == 0)


@pytest.mark.parametrize("given", ["", "m", "5 m", "5x", True, [], "1m" * 40])
def test_duration_that_is_none_is_refused(given: object) -> None:
    with pytest.raises(InvalidRequestError):
        duration_s(given)
