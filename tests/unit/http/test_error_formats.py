"""Every error class has a status and OpenAI's shape."""

from __future__ import annotations

import inspect

import orjson
import pytest

from service import errors
from service.errors import CoeError, UpstreamError
from service.http.error_formats import (
    Dialect,
    detail_of,
    dialect_of,
    error_response,
    sse_event,
    status_of,
)

STATUS = {
    "CoeError": 500,
    "ConfigError": 500,
    "InvalidProfileError": 500,
    "ArtifactError": 500,
    "ModelStoreError": 500,
    "InfeasibleBoundsError": 400,
    "InvalidRequestError": 400,
    "PromptTooLongError": 400,
    "BodyTooLargeError": 413,
    "HeadersTooLargeError": 431,
    "RequestTimeoutError": 408,
    "UnsupportedMediaTypeError": 415,
    "DisallowedFieldError": 400,
    "GuardRefusedError": 400,
    "UnknownModelError": 404,
    "ReplyNotFoundError": 404,
    "UnknownEndpointError": 404,
    "UnauthorizedError": 401,
    "ForbiddenError": 403,
    "RateLimitExceededError": 429,
    "ConflictError": 409,
    "UnavailableError": 503,
    "OverCapacityError": 503,
    "ExpertFailedError": 503,
    "PoolDrainingError": 503,
    "PoolUnavailableError": 503,
    "StoreUnavailableError": 503,
    "StorageFullError": 507,
    "PoolUnreachableError": 503,
    "PoolStoppedError": 503,
    "PoolReplacedError": 503,
    "EngineDeadError": 503,
    "EngineRestartingError": 503,
    "EngineDiedTwiceError": 500,
    "DeadlineExceededError": 504,
    "EngineTimeoutError": 504,
    "CircuitOpenError": 503,
    "UpstreamError": 502,
}
CLASSES: dict[str, type[CoeError]] = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, CoeError)
}


def test_every_error_class_has_a_status() -> None:
    assert CLASSES.keys() == STATUS.keys()


@pytest.mark.parametrize("name", sorted(STATUS))
def test_error_response_has_the_class_s_status_and_openai_s_shape(name: str) -> None:
    error = CLASSES[name]("what happened", **({} if name == "UpstreamError" else {"param": "n"}))
    fault = error_response(error)
    assert fault.status == status_of(error) == STATUS[name]
    detail = orjson.loads(fault.body)["error"]
    assert detail == detail_of(error)
    more = {"nearest"} if name == "InfeasibleBoundsError" else set()
    assert detail.keys() == {"message", "type", "param", "code"} | more
    assert detail["message"] == "what happened"
    assert detail["code"]
    headers = dict(fault.headers)
    assert headers[b"content-length"] == str(len(fault.body)).encode()
    assert (b"retry-after" in headers) == (STATUS[name] == 503)


def test_error_codes_are_unique_by_class() -> None:
    # Two of them share OpenAI's own code for a refusal or for "no such thing here".
    codes = [kind.code for kind in CLASSES.values()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize(("given_s", "header"), [(0, b"1"), (0.2, b"1"), (1.2, b"2"), (30, b"30")])
def test_retry_after_is_a_whole_number_of_seconds_above_zero(given_s: float, header: bytes) -> None:
    fault = error_response(errors.OverCapacityError("full", retry_after_s=given_s))
    assert dict(fault.headers)[b"retry-after"] == header


def test_upstream_error_keeps_the_upstream_status() -> None:
    assert status_of(UpstreamError("busy", status=503)) == 503


def test_unlisted_subclass_has_its_parent_s_status() -> None:
    class Tomorrow(errors.OverCapacityError):
        pass

    assert status_of(Tomorrow("x")) == 503


def test_sse_event_of_an_error_is_one_json_line() -> None:
    event = sse_event(errors.PoolUnavailableError("gone\n\ndata: trick"))
    assert event.startswith(b"data: {")
    assert event.endswith(b"}\n\n")
    assert event.count(b"\n") == 2
    assert orjson.loads(event[6:])["error"]["code"] == "pool_gone"


def test_rate_limit_error_has_retry_after_only_where_waiting_helps() -> None:
    soon = error_response(errors.RateLimitExceededError("full", retry_after_s=2.1))
    assert (soon.status, dict(soon.headers)[b"retry-after"]) == (429, b"3")
    assert b"retry-after" not in dict(
        error_response(errors.RateLimitExceededError("too large")).headers
    )


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (
            errors.RateLimitExceededError(
                "empty", retry_after_s=9e4, code="insufficient_quota", final=True
            ),
            True,
        ),
        (errors.RateLimitExceededError("held", retry_after_s=1, code="insufficient_quota"), False),
        (errors.RateLimitExceededError("larger than the limit"), True),
        (errors.EngineDiedTwiceError("it kills engines"), True),
        (errors.RateLimitExceededError("full", retry_after_s=2), False),
        (errors.OverCapacityError("full"), False),
        (errors.CoeError("who knows"), False),
    ],
)
@pytest.mark.parametrize("dialect", list(Dialect))
def test_error_response_tells_clients_not_to_retry_where_it_is_useless(
    error: CoeError, final: bool, dialect: Dialect
) -> None:
    result = dict(error_response(error, dialect).headers).get(b"x-should-retry")
    assert result == (b"false" if final else None)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", Dialect.MESSAGES),
        ("/v1/messages/count_tokens", Dialect.MESSAGES),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/chat/completions", Dialect.CHAT),
        ("/v1/models", Dialect.CHAT),
        ("/api/chat", Dialect.OLLAMA),
        ("/api/nothing", Dialect.OLLAMA),
        ("/nothing", Dialect.CHAT),
    ],
)
def test_dialect_of_path(path: str, dialect: Dialect) -> None:
    assert dialect_of(path) is dialect


def test_ollama_error_is_a_text() -> None:
    fault = CLASSES["UnknownModelError"]("no such model")
    reply = error_response(fault, Dialect.OLLAMA)
    assert (reply.status, orjson.loads(reply.body)) == (404, {"error": "no such model"})
    assert sse_event(fault, Dialect.OLLAMA) == reply.body + b"\n"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/nobody"])
def test_dialect_of_models_is_the_client_s(path: str) -> None:
    theirs = [(b"anthropic-version", b"2023-06-01")]
    assert dialect_of(path, theirs) is Dialect.MESSAGES
    assert dialect_of(path) is dialect_of("/v1/chat/completions", theirs) is Dialect.CHAT


@pytest.mark.parametrize("name", sorted(STATUS))
def test_anthropic_error_has_a_type_that_anthropic_defines(name: str) -> None:
    fault = error_response(CLASSES[name]("what happened"), Dialect.MESSAGES)
    data = orjson.loads(fault.body)
    kind = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        500: "api_error",
        502: "api_error",
        503: "overloaded_error",
        504: "timeout_error",
        507: "api_error",
    }.get(STATUS[name], "invalid_request_error")
    assert data == {"type": "error", "error": {"type": kind, "message": "what happened"}}
    assert dict(fault.headers)[b"content-length"] == str(len(fault.body)).encode()
    assert dict(fault.headers)[b"x-coe-fault"].decode() == CLASSES[name].code
