"""Replies of Responses pass with an id of ours and are stored, whatever a server sends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from service.gateway.request.parsing import parse_request
from service.gateway.request.stored_turn import StoredTurn
from service.gateway.stored_response_send import ResponseKeeper
from service.http.asgi_helpers import Message
from service.stored_responses.response_service import ResponseService
from service.stored_responses.stored_records import StoredResponse
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry

REQUEST = replace(
    parse_request("/v1/responses", b'{"model": "e", "input": "x"}', {}, 1000),
    stored=StoredTurn("resp_ours", True, 1),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["", "completed", "message"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["id", "type", "status", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
RESPONSE = JSON | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("status", "output", "id"), JSON)
)
KINDS = ("created", "output_item.done", "completed", "incomplete", "failed")
EVENT = JSON | st.fixed_dictionaries(
    {"type": JSON | st.sampled_from([f"response.{kind}" for kind in KINDS])},
    optional={"response": RESPONSE, "item": JSON},
)


class Kept:
    """Stored responses that only remembers what it was told to keep."""

    def __init__(self) -> None:
        self.responses: list[StoredResponse] = []

    async def keep(self, response: StoredResponse) -> bool:
        self.responses.append(response)
        return True


async def passed(kind: bytes, body: bytes) -> tuple[bytes, Kept]:
    kept = Kept()
    keeper = ResponseKeeper(cast("ResponseService", kept), MetricsRegistry(Side.GATEWAY))
    out: list[Message] = []

    async def send(message: Message) -> None:
        out.append(message)

    async with keeper.keeping(REQUEST, send) as storing:
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await storing({"type": "http.response.start", "status": 200, "headers": headers})
        await storing({"type": "http.response.body", "body": body})
    await keeper.stop()
    shown = b"".join(message.get("body", b"") for message in out)
    # What passes has another length than what the server, or the cache, told.
    told = dict(out[0]["headers"]).get(b"content-length")
    assert told in (None, str(len(shown)).encode())
    return shown, kept


@settings(max_examples=60)
@given(st.lists(EVENT, max_size=4))
async def test_stream_of_any_events_passes_and_is_stored_at_most_once(events: list[Any]) -> None:
    raw = b"".join(b"data: %s\n\n" % orjson.dumps(event) for event in events)
    body, kept = await passed(b"text/event-stream", raw)
    shown = [orjson.loads(line[5:]) for line in body.splitlines() if line]
    assert len(shown) == len(events)
    for event, found in zip(events, shown, strict=True):
        if not isinstance(event, dict) or not isinstance(event.get("response"), dict):
            assert found == event
    assert len(kept.responses) <= 1
    for response in kept.responses:
        assert response.id == response.to_json()["id"] == "resp_ours"
        (own,) = response.input
        assert own.to_json()["content"][0]["text"] == "x"


@settings(max_examples=60)
@given(RESPONSE)
async def test_whole_reply_of_any_form_passes_and_is_stored(reply: Any) -> None:
    body, kept = await passed(b"application/json", orjson.dumps(reply))
    if isinstance(reply, dict):
        assert orjson.loads(body) == {
            **reply,
            "id": "resp_ours",
            "store": True,
            "previous_response_id": None,
        }
        assert [response.id for response in kept.responses] == ["resp_ours"]
    else:
        assert orjson.loads(body) == reply
        assert not kept.responses
