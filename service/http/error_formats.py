"""Errors on the wire: the table from error classes to HTTP statuses, and all formats.

OpenAI's: https://platform.openai.com/docs/guides/error-codes; its Responses streams:
https://platform.openai.com/docs/api-reference/responses-streaming/error; Anthropic's:
https://docs.anthropic.com/en/api/errors; Ollama's: https://docs.ollama.com/api/errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import orjson

from service import errors
from service.errors import CoeError

_STATUS: dict[type[CoeError], int] = {
    errors.InvalidRequestError: 400,
    errors.BodyTooLargeError: 413,
    errors.HeadersTooLargeError: 431,
    errors.RequestTimeoutError: 408,
    errors.UnsupportedMediaTypeError: 415,
    errors.UnauthorizedError: 401,
    errors.ForbiddenError: 403,
    errors.RateLimitExceededError: 429,
    errors.UnknownModelError: 404,
    errors.ConflictError: 409,
    errors.ReplyNotFoundError: 404,
    errors.UnknownEndpointError: 404,
    errors.DeadlineExceededError: 504,
    errors.UnavailableError: 503,
    errors.UpstreamError: 502,
    errors.StorageFullError: 507,
    CoeError: 500,
}
_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    431: "invalid_request_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
FAULT_HEADER = b"x-coe-fault"
ANTHROPIC_HEADER = b"anthropic-version"
"""A header that each of Anthropic's clients sends. Some paths are those of OpenAI's API, too."""


@dataclass(frozen=True, slots=True)
class ErrorResponse:
    """An HTTP response for an error."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def status_of(error: CoeError) -> int:
    """The HTTP status of an error: that of its class, or of the nearest ancestor."""
    if isinstance(error, errors.UpstreamError):
        return error.status
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return 500


@cache
def codes_of_ours() -> frozenset[str]:
    """Codes of the errors of status 500 and above, which are this service's fault."""
    kinds = [CoeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(kind.code for kind in kinds if status_of(kind("")) >= 500)


def detail_of(error: CoeError) -> dict[str, Any]:
    """The object inside OpenAI's `{"error": …}`."""
    kind = _TYPE.get(status_of(error), "server_error")
    detail = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    if isinstance(error, errors.InfeasibleBoundsError):
        return {**detail, "nearest": error.nearest}
    return detail


class Dialect(StrEnum):
    """The API whose error format an endpoint uses."""

    CHAT = "chat"
    RESPONSES = "responses"
    MESSAGES = "messages"
    OLLAMA = "ollama"


def dialect_of(path: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> Dialect:
    """The dialect of an endpoint; OpenAI's for unknown paths.

    Args:
        path: Its path.
        headers: The request's headers, which tell the client's API where paths don't.
    """
    if path.startswith("/v1/messages"):
        return Dialect.MESSAGES
    if path.startswith("/api/"):
        return Dialect.OLLAMA
    if path.startswith("/v1/models") and any(name == ANTHROPIC_HEADER for name, _ in headers):
        return Dialect.MESSAGES
    return Dialect.RESPONSES if path.startswith("/v1/responses") else Dialect.CHAT


def error_body(detail: Mapping[str, Any], status: int, dialect: Dialect) -> bytes:
    """The body of an error reply.

    Args:
        detail: OpenAI's message, type, param and code.
        status: The HTTP status that it is sent with.
        dialect: The client's API. Chat and Responses share one format.
    """
    if dialect is Dialect.MESSAGES:
        return orjson.dumps({"type": "error", "error": _anthropic_detail(detail, status)})
    if dialect is Dialect.OLLAMA:
        return orjson.dumps({"error": str(detail.get("message"))})
    return orjson.dumps({"error": detail})


def _anthropic_detail(detail: Mapping[str, Any], status: int) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPE.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": kind, "message": str(detail.get("message"))}


def error_response(error: CoeError, dialect: Dialect = Dialect.CHAT) -> ErrorResponse:
    """Status, headers and body for an error."""
    status = status_of(error)
    body = error_body(detail_of(error), status, dialect)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (FAULT_HEADER, error.code.encode()),
    ]
    retry_after_s = _retry_after_s(error, status)
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    if error.final:
        # Clients decide on retries by the status alone: 429 and 5xx.
        headers.append((b"x-should-retry", b"false"))
    return ErrorResponse(status, headers, body)


def _retry_after_s(error: CoeError, status: int) -> float | None:
    if isinstance(error, errors.RateLimitExceededError):
        return error.retry_after_s
    if isinstance(error, (errors.UnavailableError, errors.UpstreamError)) and status == 503:
        return error.retry_after_s
    return None


def sse_event(
    error: CoeError, dialect: Dialect = Dialect.CHAT, *, sequence: int = 0, response: Any = None
) -> bytes:
    """The events that end a stream with an error; see `stream_error`."""
    status = status_of(error)
    return stream_error(detail_of(error), status, dialect, sequence=sequence, response=response)


def stream_error(
    detail: Mapping[str, Any],
    status: int,
    dialect: Dialect,
    *,
    sequence: int = 0,
    response: Any = None,
) -> bytes:
    """The events that end a stream with an error.

    Args:
        detail: OpenAI's message, type, param and code.
        status: The HTTP status of the error, had the stream not begun.
        dialect: The client's API.
        sequence: Number of the next event, which Responses streams count.
        response: The response object that a Responses stream began with, if any: it is sent again
            as failed.
    """
    event: dict[str, Any]
    if dialect is Dialect.MESSAGES:
        event = {"type": "error", "error": _anthropic_detail(detail, status)}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    if dialect is Dialect.OLLAMA:
        return error_body(detail, status, dialect) + b"\n"
    if dialect is Dialect.CHAT:
        return b"data: " + orjson.dumps({"error": detail}) + b"\n\n"
    code, message = detail.get("code"), str(detail.get("message"))
    event = {
        "type": "error",
        "sequence_number": sequence,
        "code": code if isinstance(code, str) else None,
        "message": message,
        "param": detail.get("param"),
    }
    events = b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    if isinstance(response, dict):
        error = {"code": "server_error", "message": message}
        failed = {
            "type": "response.failed",
            "sequence_number": sequence + 1,
            "response": {**response, "status": "failed", "error": error},
        }
        events += b"event: response.failed\ndata: " + orjson.dumps(failed) + b"\n\n"
    return events
