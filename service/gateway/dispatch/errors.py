"""A pool's refusals and failures, as exceptions again."""

from __future__ import annotations

import aiohttp
import orjson

from service.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineRestartingError,
    EngineTimeoutError,
    ExpertFailedError,
    OverCapacityError,
    PoolUnavailableError,
    UnavailableError,
)
from service.gateway.redaction import without_folders
from service.gateway.request.parsing import InferenceRequest
from service.rpc.client import PoolReply

# After these somebody else may answer.
RETRIED = frozenset(
    {
        "draining",
        "engine_dead",
        "engine_restarting",
        "over_capacity",
        "expert_failed",
        "pool_gone",
    }
)


def deadline_error(request: InferenceRequest, *, silent: bool) -> DeadlineExceededError:
    """In the client's own figure. `silent`: whoever had the request said nothing."""
    kind = EngineTimeoutError if silent else DeadlineExceededError
    said = f"no answer within the deadline of {request.deadline_ms} ms"
    return kind(said, code=DeadlineExceededError.code)


async def read_whole_answer(answer: PoolReply) -> bytes:
    """The body. Raises PoolUnavailableError."""
    try:
        return await answer.chunks.read()
    except (aiohttp.ClientError, OSError):
        raise PoolUnavailableError("the pool that was answering went away") from None


def error_from_fault(code: str, body: bytes, retry_after: str | None) -> UnavailableError:
    """A pool's error as an exception again, with its own words."""
    try:
        message = without_folders(str(orjson.loads(body)["error"]["message"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = "the pool could not answer"
    kinds: dict[str, type[UnavailableError]] = {
        "over_capacity": OverCapacityError,
        "expert_failed": ExpertFailedError,
        "engine_dead": EngineDeadError,
        "engine_restarting": EngineRestartingError,
    }
    return kinds.get(code, PoolUnavailableError)(message, retry_after_s=float(retry_after or 1))
