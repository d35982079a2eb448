"""The headers of a call from a gateway to a pool."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequestError
from service.rpc.call_headers import Call, parse_call, trace_of

CALL = Call("/v1/completions", "a/b", "id", 250, True, "gateway", 7)


def test_call_headers_round_trip() -> None:
    headers = {name.encode(): value.encode() for name, value in CALL.headers().items()}
    assert parse_call("/v1/completions", headers) == CALL


@pytest.mark.parametrize("missing", sorted(CALL.headers()))
def test_parse_call_without_a_header_raises(missing: str) -> None:
    headers = {n.encode(): v.encode() for n, v in CALL.headers().items() if n != missing}
    if missing == "x-coe-stream":
        headers[b"x-coe-stream"] = b"0"
        assert not parse_call("/v1/completions", headers).stream
        return
    with pytest.raises(InvalidRequestError, match=missing):
        parse_call("/v1/completions", headers)


def test_parse_call_with_a_non_numeric_number_raises() -> None:
    headers = {n.encode(): v.encode() for n, v in CALL.headers().items()}
    with pytest.raises(InvalidRequestError, match="not a number"):
        parse_call("/v1/completions", {**headers, b"x-coe-seq": b"many"})


@pytest.mark.parametrize("bad", [b"a\x0bb", b"a\rb", b"\xff", b"", b"x" * 10_000])
def test_trace_of_drops_headers_that_can_not_be_forwarded(bad: bytes) -> None:
    good = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {b"traceparent": good, b"tracestate": bad}
    assert trace_of(headers) == {"traceparent": good.decode()}
    assert trace_of({b"traceparent": bad}) == {}
