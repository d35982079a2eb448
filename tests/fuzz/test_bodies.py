"""Ten thousand random requests to the gateway's ASGI application get typed answers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loadtests.loop_hold_meter import HoldMeter
from service.http.prompt_endpoints import ENDPOINTS
from tests.support.gateway_thread import GatewayThread, gateway_in_thread
from tests.support.in_process_service import simulated

ALL = int(os.environ.get("COE_FUZZ_REQUESTS", "10000"))
# Of the event loop, in processor time of its thread.
MOST_HELD_S = 0.1


def often(examples: int) -> settings:
    """Drawing one is most of the work, so each is sent whole, broken and cut short."""
    return settings(
        max_examples=examples * ALL // 10_000,
        deadline=None,
        # The same ones in every run: what it finds is to be found by whoever broke it.
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


CONFIG = simulated(
    {"cpu": {"tokens": 2, "max_model_len": 100_000}},
    experts={
        "general": {"model": "m", "categories": ["general"]},
        "vectors": {"model": "m", "capabilities": ["embeddings"]},
    },
    server={"max_body_bytes": 200_000},
)


@pytest.fixture(scope="module")
def apart() -> Iterator[GatewayThread]:
    with gateway_in_thread(CONFIG) as made, HoldMeter(collections=False) as held:
        pools = made.gateway.pools
        engines = {kind: pool.engine for kind, pool in pools.items()}
        yield made
        # No pool was lost, and nobody else's answer waited for one request.
        assert {kind: pool.engine for kind, pool in pools.items()} == engines
        assert all(engine.failure() is None for engine in engines.values())
        assert held.longest_s < MOST_HELD_S, f"held {held.longest_s:.3f} s by {held.where}"
        seen = Counter(sorted(statuses.elements()))
        assert sum(seen.values()) >= ALL, seen
        assert seen[200] > ALL // 100, f"hardly anything got through: {seen}"
        assert seen[400] > ALL // 10, seen


statuses: Counter[int] = Counter()
strange_text = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "auto",
            "general",
            "auto:best",
            "auto/general",
            "vectors",
            "\x00",
            "\u202e",
            "😀" * 50,
            "a\r\nset-cookie: x",
            "{{ 7*7 }}",
            "../../etc/passwd",
            "http://169.254.169.254/",
            "x" * 5000,
            "-1",
        ]
    ),
)
numbers = st.one_of(
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 2**64, -1, 0, 1]),
    st.floats(),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, strange_text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(strange_text, inner, max_size=4)
    ),
    max_leaves=5,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "input_audio", "file", "x"])},
    optional={"text": values, "image_url": values, "url": values, "source": values},
)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "system", "assistant", "tool"]), values),
        "content": st.one_of(strange_text, st.lists(parts, max_size=3), values),
        "tool_calls": values,
        "name": values,
    },
)
groups = st.builds(
    lambda depth, tail: "(" * depth + "a" + tail * depth,
    st.sampled_from([1, 40, 64, 65, 1000, 17_000]),
    st.sampled_from([")", ")?", ")*", "", "){1,100}"]),
)
patterns = st.one_of(
    groups,
    strange_text,
    st.sampled_from(["(?=a)", "[" * 3000, "(a|b|c){1,1000}" * 90, "\\(" * 900, "a{1,999999999}"]),
)


def nested(schema: Any, depth: int) -> Any:
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


schemas = st.recursive(
    st.one_of(
        values,
        patterns.map(lambda text: {"type": "string", "pattern": text}),
        st.builds(nested, st.just({}), st.sampled_from([1, 20, 31, 40, 60])),
        st.sampled_from([300, 600, 3000]).map(
            lambda count: {"properties": {f"p{i}": {} for i in range(count)}}
        ),
        st.sampled_from([100, 9000]).map(lambda count: {"enum": list(range(count))}),
        st.just({"$ref": "#"}),
    ),
    lambda inner: st.one_of(
        inner.map(lambda schema: {"type": "object", "properties": {"a": schema}}),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some}),
        st.builds(lambda name, schema: {"patternProperties": {name: schema}}, patterns, inner),
    ),
    max_leaves=4,
)
forms = st.one_of(
    values,
    schemas.map(lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}),
    schemas.map(lambda schema: {"type": "json_schema", "name": "x", "schema": schema}),
    schemas.map(
        lambda schema: {
            "type": "structural_tag",
            "structures": [{"begin": "a", "schema": schema, "end": "b"}],
            "triggers": ["a"],
        }
    ),
    patterns.map(
        lambda text: {"type": "structural_tag", "format": {"type": "regex", "pattern": text}}
    ),
)
constraints = st.one_of(
    values,
    schemas.map(lambda schema: {"json": schema}),
    schemas.map(lambda schema: {"json": json.dumps(schema)}),
    forms.map(lambda form: {"structural_tag": json.dumps(form)}),
    st.builds(
        lambda name, text: {name: text}, st.sampled_from(["regex", "grammar", "json"]), patterns
    ),
    st.lists(strange_text, max_size=3).map(lambda words: {"choice": words * 500}),
)
tools = st.one_of(
    values,
    st.builds(
        lambda schema, shape, count: (
            [
                (
                    {"type": "function", "function": {"name": "f", "parameters": schema}},
                    {"type": "function", "name": "f", "parameters": schema},
                    {"name": "f", "input_schema": schema},
                )[shape]
            ]
            * count
        ),
        schemas,
        st.integers(0, 2),
        st.sampled_from([1, 3, 40, 600]),
    ),
)
fields: dict[str, Any] = {
    "model": st.one_of(st.sampled_from(["auto", "general", "vectors"]), values),
    "messages": st.one_of(st.lists(message, max_size=3), values),
    "prompt": values,
    "input": values,
    "tokens": values,
    "stream": st.one_of(st.booleans(), values),
    "stream_options": st.one_of(st.just({"include_usage": True}), values),
    "max_tokens": st.one_of(st.integers(0, 20), values),
    "max_completion_tokens": values,
    "n": st.one_of(st.integers(-1, 4), values),
    "tools": tools,
    "functions": tools,
    "structured_outputs": constraints,
    "guided_regex": patterns,
    "text": forms.map(lambda form: {"format": form}),
    "output_config": forms.map(lambda form: {"format": form}),
    "stop": st.one_of(values, strange_text.map(lambda text: [text] * 500)),
    "bad_words": st.one_of(values, strange_text.map(lambda text: [text] * 100)),
    "tool_choice": values,
    "response_format": forms,
    "chat_template_kwargs": values,
    "chat_template": values,
    "temperature": values,
    "user": values,
    "system": values,
}
objects = st.fixed_dictionaries({}, optional=fields)


def dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def broken(raw: bytes, at: int, junk: bytes) -> bytes:
    at %= len(raw) + 1
    return raw[:at] + junk + raw[at:]


junk = st.one_of(
    st.binary(max_size=4),
    st.sampled_from(
        [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"NaN", b"-", b"1e999", b"\\ud800", b"\x00"]
    ),
)
deep = st.builds(
    lambda kind, depth, tail: (
        b'{"messages":' + (b"[" if kind else b'{"a":') * depth + tail,
        b'{"model":"auto","messages":' + b"[" * depth + b"]" * depth + b"}",
    )[depth % 2],
    st.booleans(),
    st.integers(1, 5000),
    st.sampled_from([b"", b"1", b"]" * 100]),
)
bodies = st.one_of(
    objects.map(dumped),
    st.builds(broken, objects.map(dumped), st.integers(0), junk),
    st.binary(max_size=200),
    deep,
    values.map(dumped),
    st.sampled_from(
        [
            b"",
            b"null",
            b"\xef\xbb\xbf{}",
            '{"model": "auto"}'.encode("utf-16"),
            b'{"messages": [{"role": "user", "content": "' + b"x" * 199_000 + b'"}]}',
            b'{"messages": [{"role": "user", "content": "' + b"x" * 250_000 + b'"}]}',
            b'{"messages": [' + b'{"role": "user", "content": "x"},' * 3000 + b"{}]}",
            b'{"n": ' + b"9" * 100_000 + b"}",
            b'{"a": ' + b"[]," * 30_000 + b"}",
        ]
    ),
)
good_bodies = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["auto", "general"]),
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.just("user"), "content": strange_text}),
            min_size=1,
            max_size=2,
        ),
    },
    optional={k: v for k, v in fields.items() if k not in ("model", "messages")},
).map(dumped)
# What a server lets through: no line ends, no nulls.
header_values = st.one_of(
    st.binary(max_size=40).map(lambda b: b.translate(None, b"\r\n\0")),
    st.sampled_from([b"", b"x" * 5000, b"-1", b"1e9", b"9" * 40, b"application/json", b"\xff"]),
)
headers = st.dictionaries(
    st.sampled_from(
        [
            b"x-request-id",
            b"content-type",
            b"content-length",
            b"authorization",
            b"idempotency-key",
            b"accept",
            b"content-encoding",
            b"x-coe-cache",
            b"traceparent",
            b"host",
            b"x-forwarded-for",
        ]
    ),
    header_values,
    max_size=4,
).map(lambda found: [*({b"content-type": b"application/json"} | found).items()])


def check(answer: Any, path: str = "") -> None:
    statuses[answer.status] += 1
    assert answer.ended
    assert answer.status < 500, answer.body[:500]
    assert b"Traceback" not in answer.body
    if answer.status >= 400:
        data = orjson.loads(answer.body)
        error = data["error"]
        if path.startswith("/v1/messages"):
            assert data["type"] == "error"
            assert error.keys() == {"message", "type"}
        else:
            assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        assert len(answer.body) < 2000


@often(1_200)
@given(st.permutations([*ENDPOINTS, "/v1/route"]), bodies, headers, st.integers(0), junk)
def test_any_body_gets_a_typed_answer(
    apart: GatewayThread,
    paths: list[str],
    body: bytes,
    given_headers: list[tuple[bytes, bytes]],
    at: int,
    noise: bytes,
) -> None:
    bodies = (body, broken(body, at, noise), body[: at % (len(body) + 1)])
    for path, item in zip(paths, bodies, strict=False):
        check(apart.ask("POST", path, item, given_headers), path)


@often(1_200)
@given(good_bodies, headers, st.integers(0), junk)
def test_mutated_valid_body_gets_a_typed_answer(
    apart: GatewayThread,
    body: bytes,
    given_headers: list[tuple[bytes, bytes]],
    at: int,
    noise: bytes,
) -> None:
    chat = "/v1/chat/completions"
    for path, item in ((chat, body), ("/v1/route", body), (chat, broken(body, at, noise))):
        check(apart.ask("POST", path, item, given_headers), path)


methods = st.sampled_from(
    ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "X"]
)
paths = st.one_of(
    st.sampled_from([*ENDPOINTS, "/v1/models", "/metrics", "/ready", "/openapi.json", "/health"]),
    st.text(max_size=20).map(lambda text: "/v1/models/" + text),
    st.text(max_size=20).map(lambda text: "/" + text),
    st.sampled_from(
        [
            "//v1/models",
            "/v1/models/../../etc/passwd",
            "/admin/experts",
            "/admin/experts/x/y",
            "/admin/experts//",
            "/" + "a" * 8000,
            "/v1/models/" + "b" * 8000,
            "/v1/chat/completions/",
        ]
    ),
)


@often(3_000)
@given(methods, paths, st.binary(max_size=30), headers, st.binary(max_size=50))
def test_any_method_and_path_gets_a_typed_answer(
    apart: GatewayThread,
    method: str,
    path: str,
    body: bytes,
    given_headers: list[tuple[bytes, bytes]],
    query: bytes,
) -> None:
    answer = apart.ask(method, path, body, given_headers, query=query)
    if method == "HEAD" and not answer.body:
        statuses[answer.status] += 1
        assert answer.status < 500
        return
    check(answer, path)
