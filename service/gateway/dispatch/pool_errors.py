"""Turns the error replies of pools back into exceptions."""

from __future__ import annotations

import orjson

from service.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineRestartingError,
    EngineTimeoutError,
    ExpertFailedError,
    OverCapacityError,
    PoolReplacedError,
    PoolStoppedError,
    PoolUnavailableError,
    UnavailableError,
)
from service.gateway.folder_redaction import without_folders
from service.gateway.request.parsing import InferenceRequest
from service.rpc.http_connections import HttpReply

# Errors of pools after which another pool may answer, by code. A pool that drains has not died with
# the request.
_KINDS: dict[str, type[UnavailableError]] = {
    "draining": PoolStoppedError,
    "engine_dead": EngineDeadError,
    "engine_restarting": EngineRestartingError,
    "over_capacity": OverCapacityError,
    "expert_failed": ExpertFailedError,
    "pool_gone": PoolUnavailableError,
    "pool_replaced": PoolReplacedError,
}
RETRIED = frozenset(_KINDS)


def deadline_error(request: InferenceRequest, *, silent: bool) -> DeadlineExceededError:
    """Return the error for a missed deadline. It states the client's own deadline.

    Args:
        request: The request.
        silent: Whether the engine that had the request sent nothing.
    """
    kind = EngineTimeoutError if silent else DeadlineExceededError
    message = f"no answer within the deadline of {request.deadline_ms} ms"
    return kind(message, code=DeadlineExceededError.code)


async def read_whole_answer(answer: HttpReply) -> bytes:
    """Read the whole body of a reply.

    Raises:
        PoolUnavailableError: The connection to the pool was lost.
    """
    try:
        return await answer.body.read()
    except ConnectionError:
        raise PoolUnavailableError("the pool went away while it answered") from None


def error_from_fault(code: str, body: bytes, retry_after: str | None) -> UnavailableError:
    """Return the exception for a pool's error reply.

    Args:
        code: The error's code.
        body: The reply's body. The exception gets its message, without the paths of folders.
        retry_after: The reply's `Retry-After` header.
    """
    try:
        message = without_folders(str(orjson.loads(body)["error"]["message"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = "the pool could not answer"
    return _KINDS.get(code, PoolUnavailableError)(message, retry_after_s=float(retry_after or 1))
