"""Every error of ours has a status, and OpenAI's shape."""

from __future__ import annotations

import inspect

import orjson
import pytest

from service import errors
from service.errors import CoeError, UpstreamError
from service.link.faults import detail_of, fault_of, sse_event, status_of

STATUS = {
    "CoeError": 500,
    "ConfigError": 500,
    "InvalidProfile": 500,
    "ArtifactError": 500,
    "ModelStoreError": 500,
    "InvalidRequest": 400,
    "PromptTooLong": 400,
    "BodyTooLarge": 413,
    "HeadersTooLarge": 431,
    "TooSlow": 408,
    "UnsupportedMediaType": 415,
    "NotAllowed": 400,
    "GuardRefused": 400,
    "UnknownModel": 404,
    "UnknownReply": 404,
    "UnknownEndpoint": 404,
    "Unauthorized": 401,
    "Forbidden": 403,
    "TooMany": 429,
    "Conflict": 409,
    "Unavailable": 503,
    "OverCapacity": 503,
    "ExpertFailed": 503,
    "Draining": 503,
    "PoolGone": 503,
    "StoreGone": 503,
    "PoolUnreachable": 503,
    "PoolStopped": 503,
    "EngineDead": 503,
    "EngineRestarting": 503,
    "EngineDiedTwice": 500,
    "DeadlineExceeded": 504,
    "EngineSilent": 504,
    "CircuitOpen": 503,
    "UpstreamError": 502,
}
CLASSES: dict[str, type[CoeError]] = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, CoeError)
}


def test_the_table_knows_every_class() -> None:
    assert CLASSES.keys() == STATUS.keys()


@pytest.mark.parametrize("name", sorted(STATUS))
def test_status_and_shape(name: str) -> None:
    error = CLASSES[name]("what happened", **({} if name == "UpstreamError" else {"param": "n"}))
    fault = fault_of(error)
    assert fault.status == status_of(error) == STATUS[name]
    detail = orjson.loads(fault.body)["error"]
    assert detail == detail_of(error)
    assert detail.keys() == {"message", "type", "param", "code"}
    assert detail["message"] == "what happened"
    assert detail["code"]
    headers = dict(fault.headers)
    assert headers[b"content-length"] == str(len(fault.body)).encode()
    assert (b"retry-after" in headers) == (STATUS[name] == 503)


def test_codes_tell_the_classes_apart() -> None:
    # Two of them share OpenAI's own code for a refusal or for "no such thing here".
    codes = [kind.code for kind in CLASSES.values()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(("given_s", "header"), [(0, b"1"), (0.2, b"1"), (1.2, b"2"), (30, b"30")])
def test_retry_after_is_in_whole_seconds_and_never_none(given_s: float, header: bytes) -> None:
    fault = fault_of(errors.OverCapacity("full", retry_after_s=given_s))
    assert dict(fault.headers)[b"retry-after"] == header


def test_an_upstream_s_status_is_its_own() -> None:
    assert status_of(UpstreamError("busy", status=503)) == 503


def test_a_class_of_tomorrow_has_its_parent_s_status() -> None:
    class Tomorrow(errors.OverCapacity):
        pass

    assert status_of(Tomorrow("x")) == 503


def test_an_error_as_the_last_event_of_a_stream() -> None:
    event = sse_event(errors.PoolGone("gone\n\ndata: trick"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert orjson.loads(event[6:])["error"]["code"] == "pool_gone"


def test_a_limit_says_when_there_is_room_and_nothing_where_there_never_is() -> None:
    soon = fault_of(errors.TooMany("full", retry_after_s=2.1))
    assert (soon.status, dict(soon.headers)[b"retry-after"]) == (429, b"3")
    assert b"retry-after" not in dict(fault_of(errors.TooMany("too large")).headers)
