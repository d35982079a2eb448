"""Request limits: each refusal, and the valid requests beside it."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import orjson
import pytest

from service.config import Config
from service.errors import (
    BodyTooLargeError,
    DisallowedFieldError,
    HeadersTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
)
from service.gateway.request.body_limits import RequestLimitChecker
from service.http.asgi_helpers import read_body
from tests.support.in_process_service import simulated

LIMITS = {"max_headers": 10, "max_header_bytes": 1024, "max_json_depth": 8, "max_json_values": 100}
MANY = RequestLimitChecker(simulated({"cpu": {}}))
FEW = RequestLimitChecker(simulated({"cpu": {}}, server={"limits": LIMITS}))


def with_hosts(*hosts: str) -> RequestLimitChecker:
    config = {
        "experts": {"general": {"model": "m"}},
        "pools": {"cpu": {"engine": "simulated", "vllm": {"media_domains": hosts}}},
    }
    return RequestLimitChecker(Config.model_validate(config))


def test_headers_beyond_count_or_size_raise() -> None:
    FEW.headers([(b"a", b"b")] * 10)
    with pytest.raises(HeadersTooLargeError, match="11 headers"):
        FEW.headers([(b"a", b"b")] * 11)
    with pytest.raises(HeadersTooLargeError, match="1025 bytes"):
        FEW.headers([(b"a", b"b" * 1024)])


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 8 + b"]" * 8,
        b'{"a":' * 7 + b"[]" + b"}" * 7,
        b'"' + b"[" * 10_000 + b'"',
        rb'["\"[[[[[[[[[[[[[[[[[[[", "\\"]',
        b"[" + b"[]," * 40 + b"1]",
        b'["' + b"," * 1000 + b'"]',
        b"",
        b"}]}]",
    ],
)
def test_shape_within_depth_and_value_limits_passes(raw: bytes) -> None:
    FEW.shape(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"[" * 9 + b"]" * 9, "9 levels"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "9 levels"),
        (b"[" * 90_000, "values"),
        (b"[" * 90, "90 levels"),
        (b"[" + b"1," * 101 + b"1]", "about 102 values"),
        (rb'["\\", [[[[[[[[[]]]]]]]]]]', "10 levels"),
    ],
)
def test_shape_beyond_depth_or_value_limits_raises(raw: bytes, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        FEW.shape(raw)


def image(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ x }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": ["x"]}}, "chat_template_kwargs"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ({"prompt_embeds": "abc"}, "prompt_embeds"),
        ({"kv_transfer_params": {"remote_host": "evil"}}, "kv_transfer_params"),
        ({"lora_path": "/etc"}, "lora_path"),
        ({"mcp_servers": [{"url": "http://evil"}]}, "mcp_servers"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "mcp", "server_url": "http://evil"}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"tools": [{"type": ["function"]}]}, "tools"),
        ({"tools": [{"type": {}}]}, "tools"),
        (
            {"messages": [{"content": [{"type": ["text"], "url": "http://evil"}]}]},
            "messages[0].content[0].url",
        ),
        (image("http://evil/x.png"), "messages[0].content[0].image_url"),
        (image("file:///etc/passwd"), "messages[0].content[0].image_url"),
        (image("/etc/passwd"), "messages[0].content[0].image_url"),
        (image(["http://evil"]), "messages[0].content[0].image_url"),
        (
            {"messages": [{"role": "user", "content": [{"image_url": "http://evil"}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"content": [{"type": "image", "source": {"url": "http://evil"}}]}]},
            "messages[0].content[0].source.url",
        ),
        (
            {"messages": [{"content": [{"type": "tool_result", "content": [{"url": "x://"}]}]}]},
            "messages[0].content[0].content[0].url",
        ),
        ({"input": [{"type": "input_file", "file_id": "f"}]}, "input[0]"),
        ({"input": [{"content": [{"type": "input_image", "image_url": "http://evil"}]}]}, None),
        ({"system": [{"type": "image", "source": {"url": "http://evil"}}]}, None),
        ({"messages": [{"content": [{"type": "image", "image": "/etc/passwd"}]}]}, None),
        ({"messages": [{"content": [{"type": "video", "video": "file:///evil"}]}]}, None),
        ({"messages": [{"content": [{"type": "input_video", "input_video": "evil"}]}]}, None),
        ({"messages": [{"content": [{"type": "audio", "audio": {"url": "http://evil"}}]}]}, None),
        ({"messages": [{"content": [[{"type": "x", "image_url": "http://evil"}]]}]}, None),
    ],
)
def test_fields_that_name_files_urls_or_code_raise(data: dict[str, Any], param: str | None) -> None:
    with pytest.raises(DisallowedFieldError) as refused:
        MANY.fields(data)
    if param is not None:
        assert refused.value.param == param
    assert "evil" not in refused.value.message


@pytest.mark.parametrize(
    "data",
    [
        {"messages": [{"role": "user", "content": "see http://example.com/x and file:///etc"}]},
        {"chat_template": None, "priority": 0, "background": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"url": 1}}}]},
        {"tools": [{"name": "f", "input_schema": {"properties": {"image_url": {}}}}]},
        image("data:image/png;base64,AAAA"),
        {"messages": [{"content": [{"type": "tool_use", "input": {"url": "http://x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "url": 1}]}]},
        {"messages": [{"role": "assistant", "content": "x", "audio": {"id": "audio_1"}}]},
        {"messages": "x", "input": 1, "tools": {}, "chat_template_kwargs": 3},
        {"n": 128},
    ],
)
def test_fields_without_files_urls_or_code_pass(data: dict[str, Any]) -> None:
    MANY.fields(data)


def test_fields_media_urls_of_allowed_hosts_pass_and_lookalikes_raise() -> None:
    limits = with_hosts("images.example.com")
    limits.fields(image("https://images.example.com/x.png"))
    for url in (
        "https://images.example.com@evil/x",
        "https://evil\\@images.example.com/x",
        "https://evil#@images.example.com",
        "https://images.example.com.evil/x",
        "ftp://images.example.com/x",
        "https://images.example.com\t/x",
        "http://[x",
    ):
        with pytest.raises(DisallowedFieldError, match=r"hosts images\.example\.com"):
            limits.fields(image(url))


def arriving(*messages: tuple[bytes, bool]) -> Any:
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        for body, more in left:
            return {"type": "http.request", "body": body, "more_body": more}
        await asyncio.Event().wait()
        raise AssertionError

    return receive


async def test_read_body_in_pieces_enforces_size_and_timeout() -> None:
    assert await read_body(arriving((b"ab", True), (b"", True), (b"c", False)), 3) == b"abc"
    with pytest.raises(BodyTooLargeError):
        await read_body(arriving((b"ab", True), (b"cd", True)), 3)
    for declared in (b"4", b"9" * 30):
        with pytest.raises(BodyTooLargeError):
            await read_body(arriving(), 3, declared=declared)
    with pytest.raises(RequestTimeoutError, match=r"0\.01 s"):
        await read_body(arriving((b"a", True)), 3, declared=b"x", timeout_s=0.01)


async def test_read_body_of_many_tiny_pieces_uses_little_memory() -> None:
    receive = arriving(*[(b"x", True)] * 200_000, (b"", False))
    tracemalloc.start()
    body = await read_body(receive, 10**6)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(body) == 200_000
    assert peak_bytes < 2_000_000


def test_shape_of_large_bodies_takes_linear_time() -> None:
    """A guard against a scan that is not linear: these would take minutes then."""
    strings = orjson.dumps(['\\"[[' * 1_000_000])
    MANY.shape(strings)
    with pytest.raises(InvalidRequestError):
        MANY.shape(b"[[]," * 2_000_000)
    MANY.shape(b'"' + b"\\" * 4_000_000)


@pytest.mark.parametrize("inner", [[], [{"type": "text", "text": "x"}], {"type": "base64"}])
def test_fields_parts_nested_too_deep_raise(inner: object) -> None:
    name = "source" if isinstance(inner, dict) else "content"
    part: dict[str, object] = {"role": "user", name: inner}
    for _ in range(4):
        part = {"role": "user", "content": [part]}
    MANY.fields({"messages": part["content"]})
    with pytest.raises(InvalidRequestError, match="levels deep"):
        MANY.fields({"messages": [part]})


@pytest.mark.parametrize("tail", [b"", b"\\", b"x", b'\\"', b"\\\\"])
def test_shape_of_an_unterminated_string_takes_linear_time(tail: bytes) -> None:
    from service.gateway.request.body_limits import _STRING

    quotes = rb"\"" * 50_000 + tail
    raw = b'{"a": "b", "c": "' + quotes
    found = list(_STRING.finditer(raw))
    assert [raw[item.start() : item.end()] for item in found[:3]] == [b'"a"', b'"b"', b'"c"']
    assert len(found) == 4
    assert found[3].end() == len(raw)
    # As deep as may be, so that it is looked at as a whole: a megabyte of it is no work.
    MANY.shape(b'{"a":' * 60 + b'"' + rb"\"[{" * 250_000)
