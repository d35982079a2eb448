"""Errors on the wire: the one table from error class to HTTP status, and OpenAI's error shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import orjson

from service import errors
from service.errors import CoeError

_STATUS: dict[type[CoeError], int] = {
    errors.InvalidRequest: 400,
    errors.BodyTooLarge: 413,
    errors.HeadersTooLarge: 431,
    errors.TooSlow: 408,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.TooMany: 429,
    errors.UnknownModel: 404,
    errors.Conflict: 409,
    errors.UnknownReply: 404,
    errors.UnknownEndpoint: 404,
    errors.DeadlineExceeded: 504,
    errors.Unavailable: 503,
    errors.UpstreamError: 502,
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
    429: "rate_limit_error",
}
FAULT_HEADER = b"x-coe-fault"


@dataclass(frozen=True, slots=True)
class Fault:
    """An error ready to be sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def status_of(error: CoeError) -> int:
    """The HTTP status of an error: its own class's row, or the nearest ancestor's."""
    if isinstance(error, errors.UpstreamError):
        return error.status
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return 500


@cache
def codes_of_ours() -> frozenset[str]:
    """The codes of the errors that are our fault: of status 500 and more."""
    kinds = [CoeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return frozenset(kind.code for kind in kinds if status_of(kind("")) >= 500)


def detail_of(error: CoeError) -> dict[str, str | None]:
    """The inside of OpenAI's `{"error": …}`."""
    kind = _TYPE.get(status_of(error), "server_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def fault_of(error: CoeError) -> Fault:
    """Status, headers and body for an error."""
    status = status_of(error)
    body = orjson.dumps({"error": detail_of(error)})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (FAULT_HEADER, error.code.encode()),
    ]
    retry_after_s = _retry_after_s(error, status)
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    if isinstance(error, errors.EngineDiedTwice):
        # OpenAI's and Anthropic's clients repeat what got a 500 unless they are told not to.
        headers.append((b"x-should-retry", b"false"))
    return Fault(status, headers, body)


def _retry_after_s(error: CoeError, status: int) -> float | None:
    if isinstance(error, errors.TooMany):
        return error.retry_after_s
    if isinstance(error, (errors.Unavailable, errors.UpstreamError)) and status == 503:
        return error.retry_after_s
    return None


def sse_event(error: CoeError) -> bytes:
    """An error as the last event of a stream that had begun."""
    return b"data: " + orjson.dumps({"error": detail_of(error)}) + b"\n\n"
