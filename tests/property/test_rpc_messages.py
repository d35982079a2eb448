"""Messages between gateways and pools round-trip, and any bytes are decoded or refused."""

from __future__ import annotations

import json
from contextlib import suppress

import orjson
from hypothesis import given
from hypothesis import strategies as st

from service.errors import CoeError
from service.gateway.request.parsing import parse_request
from service.http.prompt_endpoints import ENDPOINTS
from service.rpc.call_headers import Call, parse_call
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed, decode, encode
from service.types import Residency

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
seconds = st.floats(0, 1e6, allow_nan=False)
counts = st.integers(0, 2**53)
states = st.builds(
    ExpertState,
    st.sampled_from(Residency),
    eta_s=seconds,
    swap_s=seconds,
    slot=counts,
    reason=st.text(st.characters(codec="utf-8"), max_size=20),
    max_model_len=counts,
    engine=st.dictionaries(names, names, max_size=2),
)
snapshots = st.builds(
    Snapshot,
    boot=st.just("boot"),
    kind=st.just("cpu"),
    seq=counts,
    draining=st.booleans(),
    experts=st.dictionaries(names, states, max_size=3),
    queues=st.dictionaries(names, st.builds(Queue, counts, counts), max_size=3),
    capacity=st.dictionaries(names, counts, max_size=3),
    speeds=st.dictionaries(names, st.builds(Speed, seconds, seconds), max_size=3),
    acks=st.dictionaries(names, counts, max_size=3),
    prefixes=st.dictionaries(names, names, max_size=3),
)


@given(st.lists(snapshots, min_size=1, max_size=5))
def test_snapshot_stream_round_trips(states: list[Snapshot]) -> None:
    sent: Snapshot | None = None
    heard: Snapshot | None = None
    for snapshot in states:
        line = encode(snapshot, sent)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        heard, _ = decode(line, heard)
        sent = snapshot
        assert heard == snapshot


def _dumped(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # integers of over 64 bits, lone surrogates
        return json.dumps(value).encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(
    ["boot", "kind", "seq", "draining", "experts", "queues", "capacity", "speeds", "acks", "x"]
)


@given(
    st.binary() | st.dictionaries(fields, json_values).map(_dumped),
    st.none() | snapshots,
)
def test_decode_any_line_returns_a_snapshot_or_raises_value_error(
    line: bytes, before: Snapshot | None
) -> None:
    with suppress(ValueError):
        decode(line, before)


request_fields = st.sampled_from(
    ["model", "messages", "prompt", "input", "stream", "tools", "tool_choice", "response_format"]
)
bodies = (
    st.binary()
    | json_values.map(_dumped)
    | st.dictionaries(request_fields, json_values).map(_dumped)
)
headers = st.dictionaries(
    st.sampled_from([b"x-request-id", b"x-coe-deadline-ms", b"content-type"]), st.binary()
)


@given(st.sampled_from(ENDPOINTS), bodies, headers)
def test_parse_request_any_body_is_parsed_or_raises_a_typed_error(
    endpoint: str, raw: bytes, given_headers: dict[bytes, bytes]
) -> None:
    try:
        request = parse_request(endpoint, raw, given_headers, 1000)
    except CoeError:
        return
    assert request.client_id.isascii()
    assert request.client_id.isprintable()
    assert 1 <= request.deadline_ms <= 86_400_000
    with suppress(CoeError):
        assert orjson.loads(request.body_for("somebody"))["model"] == "somebody"


calls = st.builds(
    Call,
    st.sampled_from(ENDPOINTS),
    st.from_regex(r"\A[A-Za-z0-9._:/-]{1,20}\Z"),
    st.from_regex(r"\A[a-f0-9]{4}\Z"),
    counts,
    st.booleans(),
    st.from_regex(r"\A[a-f0-9]{4}\Z"),
    counts,
)


@given(calls)
def test_call_headers_round_trip(call: Call) -> None:
    details = {name.encode(): value.encode() for name, value in call.headers().items()}
    assert parse_call(call.endpoint, details) == call


@given(
    st.dictionaries(
        st.sampled_from([*(n.encode() for n in Call("", "", "", 0, True, "", 0).headers())]),
        st.binary(),
    )
)
def test_parse_call_any_headers_are_parsed_or_raise_a_typed_error(
    given_headers: dict[bytes, bytes],
) -> None:
    with suppress(CoeError):
        parse_call("/v1/completions", given_headers)
