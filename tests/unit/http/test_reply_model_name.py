"""Another model's name in replies and events, and nowhere else."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import reply_model_name
from service.http.reply_model_name import rename_lines, rename_reply

TEXTS = st.text() | st.just('"model": "held"') | st.just('\\"model\\":\\"held\\"')
VALUES: st.SearchStrategy[Any] = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers(0, 9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "text", "tools"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(before=VALUES, after=VALUES)
def test_rename_reply_changes_the_reply_s_own_name_alone(before: Any, after: Any) -> None:
    reply = {"id": "1", "tools": before, "model": "held", "output": after}
    named = rename_reply(orjson.dumps(reply), 'a"sked')
    assert orjson.loads(named) == reply | {"model": 'a"sked'}


@given(value=VALUES)
def test_rename_reply_without_a_name_changes_nothing(value: Any) -> None:
    body = orjson.dumps({"data": value})
    assert rename_reply(body, "asked") == body


def test_rename_reply_beyond_the_most_that_is_searched_reads_it_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reply_model_name, "_MOST_READ", 40)
    reply = {"tools": [{"model": "other"}] * 9, "model": "held"}
    assert orjson.loads(rename_reply(orjson.dumps(reply), "asked")) == reply | {"model": "asked"}


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model": "held"', b'"model": "held"', b"{"])
def test_rename_reply_of_no_object_does_not_raise(body: bytes) -> None:
    rename_reply(body, "asked")


@given(value=VALUES)
def test_rename_lines_changes_events_and_what_they_hold(value: Any) -> None:
    events = [
        {"model": "held", "choices": value},
        {"type": "message_start", "message": {"model": "held", "content": value}},
        {"type": "response.created", "response": {"model": "held", "tools": value}},
        {"type": "other", "delta": value},
    ]
    lines = b"".join(b"event: e\ndata: " + orjson.dumps(event) + b"\n\n" for event in events)
    named = rename_lines(lines + b"data: [DONE]\n\n", "asked").split(b"\n\n")
    assert named[-2:] == [b"data: [DONE]", b""]
    found = [orjson.loads(line.partition(b"data: ")[2]) for line in named[:-2]]
    assert found[0] == events[0] | {"model": "asked"}
    assert found[1]["message"] == {"model": "asked", "content": value}
    assert found[2]["response"] == {"model": "asked", "tools": value}
    assert found[3] == events[3]
