"""Parsing of request bodies, with the invalid field named in each error."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from service.errors import InvalidRequestError
from service.gateway.request import parsing
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.http.prompt_endpoints import ENDPOINTS
from service.types import Tenant

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
EVERY_PROMPT: dict[str, Any] = {
    **{"messages": HELLO, "prompt": "x", "input": "x"},
    **{"query": "x", "documents": ["x"], "queries": "x", "file": "UklGRg=="},
}


def request_for(
    data: Any, path: str = CHAT, headers: dict[bytes, bytes] | None = None
) -> InferenceRequest:
    raw = data if isinstance(data, bytes) else orjson.dumps(data)
    return parse_request(path, raw, headers or {}, 120_000)


def test_parse_request_reads_model_stream_needs_and_default_deadline() -> None:
    got = request_for({"model": "math", "messages": HELLO, "stream": True, "x": [1]})
    assert (got.model, got.stream, got.needs) == ("math", True, frozenset({"chat"}))
    assert got.deadline_ms == 120_000
    assert got.client_id == got.request_id
    assert len(got.request_id) == 24


def test_parse_request_without_model_is_auto_and_null_stream_is_false() -> None:
    got = request_for({"messages": HELLO, "stream": None})
    assert got.model == "auto"
    assert not got.stream


@pytest.mark.parametrize(
    ("path", "data", "param", "words"),
    [
        (CHAT, b"{", None, "the body is not valid JSON"),
        (CHAT, b"\xff", None, "the body is not valid JSON"),
        (CHAT, [], None, "the body must be a JSON object, not a list"),
        (CHAT, {"model": 1, "messages": HELLO}, "model", "a non-empty string, not a number"),
        (CHAT, {"model": "", "messages": HELLO}, "model", "`model` must be a non-empty string"),
        (CHAT, {"stream": "yes", "messages": HELLO}, "stream", "not a string"),
        (CHAT, {"stream_options": "all", "messages": HELLO}, "stream_options", "not a string"),
        (CHAT, {}, "messages", "`messages` is required"),
        (CHAT, {"messages": None}, "messages", "`messages` is required"),
        (CHAT, {"messages": "hi"}, "messages", "must be a list, not a string"),
        (CHAT, {"messages": []}, "messages", "at least one message"),
        (CHAT, {"messages": [1]}, "messages[0]", "must be an object, not a number"),
        (CHAT, {"messages": [{}, None]}, "messages[1]", "must be an object, not null"),
        ("/v1/completions", {}, "prompt", "`prompt` is required"),
        ("/v1/completions", {"prompt": True}, "prompt", "a string or a list, not a boolean"),
        ("/v1/embeddings", {"input": {}}, "input", "a string or a list, not an object"),
        ("/v1/responses", {}, "input", "`input` is required"),
        ("/v1/messages", {}, "messages", "`messages` is required"),
    ],
)
def test_parse_request_invalid_body_raises_with_the_field(
    path: str, data: Any, param: str | None, words: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request_for(data, path)
    assert caught.value.param == param
    assert words in caught.value.message


@pytest.mark.parametrize("given", [b"0", b"-1", b"1.5", b"x", b"", b"86400001", b"\xb2"])
def test_parse_request_invalid_deadline_header_raises(given: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request_for({"messages": HELLO}, headers={b"x-coe-deadline-ms": given})
    assert caught.value.param == "x-coe-deadline-ms"


def test_parse_request_reads_deadline_and_request_id_headers() -> None:
    given = {b"x-coe-deadline-ms": b"250", b"x-request-id": b"mine-1"}
    got = request_for({"messages": HELLO}, headers=given)
    assert (got.deadline_ms, got.client_id) == (250, "mine-1")
    assert got.request_id != "mine-1"


@pytest.mark.parametrize("given", [b"a b", b"", b"x" * 129, b"a\r\nb", "é".encode()])
def test_parse_request_unprintable_request_id_is_replaced(given: bytes) -> None:
    got = request_for({"messages": HELLO}, headers={b"x-request-id": given})
    assert got.client_id == got.request_id


@pytest.mark.parametrize(
    ("path", "more", "needs"),
    [
        (CHAT, {"tools": [{}]}, {"chat", "tools"}),
        (CHAT, {"tools": [{}], "tool_choice": "none"}, {"chat"}),
        (CHAT, {"response_format": {"type": "json_schema"}}, {"chat", "json"}),
        (CHAT, {"response_format": {"type": "text"}}, {"chat"}),
        ("/v1/completions", {"prompt": "x"}, {"completions"}),
        ("/v1/embeddings", {"input": "x"}, {"embeddings"}),
        ("/tokenize", {"prompt": "x"}, set()),
        ("/detokenize", {"tokens": [1]}, set()),
    ],
)
def test_parse_request_derives_needed_capabilities(path: str, more: Any, needs: set[str]) -> None:
    data = {"messages": HELLO, **more}
    assert request_for(data, path).needs == needs


def test_body_for_the_named_expert_is_the_original_bytes() -> None:
    raw = b'{ "model":"math" ,"messages":[{"role":"user","content":"hello"}], "seed": 1.50}'
    got = request_for(raw)
    assert got.body_for("math") is raw
    sent = orjson.loads(got.body_for("general"))
    assert sent == {**orjson.loads(raw), "model": "general"}


def test_body_for_too_deeply_nested_body_raises() -> None:
    deep = b'{"messages":[{"role":"user","content":' + b"[" * 500 + b"]" * 500 + b"}]}"
    with pytest.raises(InvalidRequestError, match="nested too deep"):
        request_for(deep).body_for("general")


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "field", ["n", "best_of", "max_tokens", "max_completion_tokens", "max_output_tokens", "max_new"]
)
@pytest.mark.parametrize("value", ["16384", 16384.0, True, [5], {}, 1e30, "x"])
def test_parse_request_non_integer_count_raises(path: str, field: str, value: object) -> None:
    body = {**EVERY_PROMPT, field: value}
    with pytest.raises(InvalidRequestError, match=f"`{field}` must be an integer") as caught:
        request_for(body, path)
    assert caught.value.param == field


@pytest.mark.parametrize("path", ENDPOINTS)
def test_parse_request_null_field_is_treated_as_unset(path: str) -> None:
    body = {**EVERY_PROMPT}
    if path == "/v1/score":
        body = {"text_1": "x", "text_2": "x"}
    nulls = ("model", "stream", "stream_options", "n", "max_tokens", "priority", "coe", "tools")
    got = request_for({**body, **dict.fromkeys(nulls)}, path)
    assert got.data == body
    assert orjson.loads(got.body_for("general")) == {**body, "model": "general"}


def test_body_for_a_named_expert_drops_null_fields() -> None:
    got = request_for({"model": "math", "messages": HELLO, "priority": None})
    assert orjson.loads(got.body_for("math")) == {"model": "math", "messages": HELLO}


@pytest.mark.parametrize(
    ("path", "more", "tokens"),
    [
        (CHAT, {}, None),
        (CHAT, {"max_tokens": 7}, 7),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": 5}, 5),
        (CHAT, {"max_output_tokens": 7}, None),
        ("/v1/completions", {"prompt": "x"}, 16),
        ("/v1/completions", {"prompt": "x", "max_tokens": 7}, 7),
        ("/v1/completions", {"prompt": "x", "max_completion_tokens": 7}, 16),
        ("/v1/responses", {"input": "x", "max_tokens": 7}, None),
        ("/v1/responses", {"input": "x", "max_output_tokens": 7}, 7),
        ("/v1/messages", {"max_tokens": 7}, 7),
        ("/v1/embeddings", {"input": "x", "max_tokens": 7}, None),
    ],
)
def test_most_tokens_reads_the_field_of_the_endpoint(
    path: str, more: dict[str, Any], tokens: int | None
) -> None:
    assert request_for({"messages": HELLO, **more}, path).most_tokens == tokens


@pytest.mark.parametrize("model", ["math", "auto"])
@pytest.mark.parametrize(
    "twice",
    [
        b'"n": 1, "n": 128',
        b'"n": 128, "n": 1',
        b'"max_tokens": 1, "max_tokens": 4096',
        b'"max_tokens": 4096, "\\u006dax_tokens": 1',
        b'"N": 1, "n": 128, "n ": 2',
        b'"structured_outputs": {"regex": "a"}, "structured_outputs": {"regex": "b"}',
        b'"stream": true, "stream": false',
        b'"tools": [], "tools": [{"name": "f", "name": "g"}]',
    ],
)
def test_parse_request_duplicate_key_is_read_as_the_engine_reads_it(
    model: str, twice: bytes
) -> None:
    """Engines read with `json`: where the bytes go on as they came, they see what was checked."""
    raw = b'{"model": "%b", "messages": [{"role": "user", "content": "x"}], %b}' % (
        model.encode(),
        twice,
    )
    got = request_for(raw)
    sent = json.loads(got.body_for("math"))
    assert sent == {**got.data, "model": "math"}


def test_parse_request_duplicate_model_uses_the_last() -> None:
    got = request_for(b'{"model": "other", "messages": [{"role": "user"}], "model": "math"}')
    assert got.model == "math"
    assert json.loads(got.body_for("math"))["model"] == "math"


@pytest.mark.parametrize("own", ["high", "normal", "low"])
@pytest.mark.parametrize("asked_for", [None, "high", "normal", "low"])
def test_parse_request_priority_header_only_lowers_the_class(
    own: str, asked_for: str | None
) -> None:
    order = ["high", "normal", "low"]
    headers = {b"x-coe-priority": asked_for.encode()} if asked_for else {}
    got = parse_request(
        CHAT, orjson.dumps({"messages": HELLO}), headers, 1000, Tenant(priority=own)
    )
    assert got.tenant.priority == order[max(order.index(own), order.index(asked_for or own))]


def test_parse_request_unknown_priority_names_the_allowed_ones() -> None:
    with pytest.raises(InvalidRequestError, match="takes high, normal, low"):
        request_for({"messages": HELLO}, headers={b"x-coe-priority": b"urgent"})


@pytest.mark.parametrize("value", [b"0.25", b"0.2500000000000000000000000000000000001", b"25e-2"])
def test_parse_request_bounds_in_headers_are_read_whole(value: bytes) -> None:
    headers = {b"x-coe-max-cost": value, b"x-coe-min-quality": value}
    request = request_for({"messages": HELLO}, headers=headers)
    assert (request.max_cost, request.min_quality) == (0.25, 0.25)


BOUNDS = {"min_quality": 0.5, "max_cost": 2, "allow": ["a", "b"], "deny": ["b"]}
BOUND_HEADERS = {
    b"x-coe-min-quality": b"0.75",
    b"x-coe-max-cost": b"3",
    b"x-coe-allow": b"c , d,",
    b"x-coe-deny": b"d",
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_parse_request_bounds_of_every_endpoint_come_from_body_and_headers(path: str) -> None:
    body = {**EVERY_PROMPT, "model": "a"}
    plain = request_for(body, path)
    assert (plain.min_quality, plain.max_cost, plain.allow, plain.deny) == (
        0,
        None,
        None,
        frozenset(),
    )
    got = request_for({**body, "coe": BOUNDS}, path)
    assert (got.min_quality, got.max_cost) == (0.5, 2)
    assert (got.allow, got.deny) == (frozenset("ab"), frozenset("b"))
    assert b"coe" not in got.body_for("a"), "no engine sees it"
    over = request_for({**body, "coe": BOUNDS}, path, BOUND_HEADERS)
    assert (over.min_quality, over.max_cost) == (0.75, 3)
    assert (over.allow, over.deny) == (frozenset("cd"), frozenset("d"))
    # Other bounds do not change what the prompt is expected to cost.
    longer = request_for(
        {**body, "coe": {**BOUNDS, "max_cost": 2.123456, "deny": ["b"] * 99}}, path
    )
    assert longer.most_prompt_tokens == got.most_prompt_tokens


@pytest.mark.parametrize(
    ("header", "value", "words"),
    [
        (
            b"x-coe-min-quality",
            b"1.01",
            "x-coe-min-quality must be a number from 0 to 1",
        ),
        (b"x-coe-min-quality", b"nan", "x-coe-min-quality must be a number from 0 to 1"),
        (b"x-coe-max-cost", b"-1", "the header x-coe-max-cost must be a number of at least 0"),
        # Cut to 32 characters, it would be 100,000 times as much.
        (b"x-coe-max-cost", b"1." + b"0" * 70 + b"e-5", "x-coe-max-cost must be a number"),
        (b"x-coe-min-quality", b"0." + b"9" * 70 + b"e-5", "x-coe-min-quality must be a number"),
        (b"x-coe-max-cost", b"1_000", "x-coe-max-cost must be a number"),
        (b"x-coe-allow", b" , ", "the header x-coe-allow must be a list of 1 to 1000 names"),
        (b"x-coe-deny", b"a," * 1001, "the header x-coe-deny must be a list of 1 to 1000 names"),
    ],
)
def test_parse_request_invalid_bounds_in_headers_are_named(
    header: bytes, value: bytes, words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        request_for({"messages": HELLO}, headers={header: value})
    assert caught.value.param == header.decode()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO * 5}),
        (CHAT, {"messages": [{"role": "user", "content": [{}] * 4}]}),
        ("/v1/messages", {"messages": HELLO * 5}),
        ("/v1/messages/count_tokens", {"messages": HELLO * 5}),
        ("/v1/responses", {"input": HELLO * 5}),
        ("/v1/responses/input_tokens", {"input": HELLO * 5}),
        ("/tokenize", {"messages": HELLO * 5}),
    ],
)
def test_parse_request_counts_messages_before_anything_reads_them(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parse_request(path, orjson.dumps(body), {}, 1000, max_messages=5)

    def reads(*_: object) -> Any:
        raise AssertionError("the conversation was read before its length was checked")

    for name in ("turn_state", "media_of", "leave_out_hosted_tools"):
        monkeypatch.setattr(parsing, name, reads)
    with pytest.raises(InvalidRequestError, match="5 messages and parts of messages; at most 4"):
        parse_request(path, orjson.dumps(body), {}, 1000, max_messages=4)


ONE_OF_EACH = {
    "deadline_ms": 500,
    "max_cost": 0.0,
    "min_quality": 0.1,
    "allow": ["general"],
    "deny": ["math"],
}


@pytest.mark.parametrize("option", parsing._COE_OPTIONS)
def test_bounds_choice_is_true_with_each_of_the_options_that_bound_it(option: str) -> None:
    """Without bounds their check is skipped, so an option that is missed would do nothing."""
    body: dict[str, Any] = {"model": "auto", "messages": HELLO}
    assert not request_for(body).bounds_choice
    assert request_for({**body, "coe": {option: ONE_OF_EACH[option]}}).bounds_choice
