"""Replies that are read and could not be written again are refused; all others pass."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import UpstreamError
from service.http.reply_depth import MOST_LEVELS, check_events, check_reply


def nested(levels: int) -> bytes:
    return b'{"model":"m","x":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


@given(levels=st.integers(2, 1024))
def test_check_refuses_what_can_not_be_written(levels: int) -> None:
    reply = nested(levels)
    events = b"event: x\ndata: {}\n\ndata: %s\n\n" % reply
    if levels <= MOST_LEVELS:
        orjson.dumps(orjson.loads(reply))
        check_reply(reply, "far")
        check_events(events, "far")
        return
    with pytest.raises(orjson.JSONEncodeError):
        orjson.dumps(orjson.loads(reply))
    for check, data in ((check_reply, reply), (check_events, events)):
        with pytest.raises(UpstreamError, match=r"'far'.*254 levels"):
            check(data, "far")


@pytest.mark.parametrize(
    "data", [b"", b"[" * 5000, b"data: {\n" * 300, b'{"x":"' + b"[" * 999 + b'"}']
)
def test_check_lets_pass_what_is_flat_or_no_json(data: bytes) -> None:
    check_reply(data, "far")
    check_events(data, "far")
