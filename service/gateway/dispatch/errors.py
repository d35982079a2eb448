"""A pool's refusals and failures, as exceptions again."""

from __future__ import annotations

import aiohttp
import orjson

from service.errors import (
    DeadlineExceeded,
    EngineDead,
    EngineRestarting,
    EngineSilent,
    ExpertFailed,
    OverCapacity,
    PoolGone,
    Unavailable,
)
from service.gateway.redaction import without_folders
from service.gateway.request.parsing import Asked
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


def too_late(asked: Asked, *, silent: bool) -> DeadlineExceeded:
    """In the client's own figure. `silent`: whoever had the request said nothing."""
    kind = EngineSilent if silent else DeadlineExceeded
    said = f"no answer within the deadline of {asked.deadline_ms} ms"
    return kind(said, code=DeadlineExceeded.code)


async def whole(answer: PoolReply) -> bytes:
    """The body. Raises PoolGone."""
    try:
        return await answer.chunks.read()
    except (aiohttp.ClientError, OSError):
        raise PoolGone("the pool that was answering went away") from None


def fault_from(code: str, body: bytes, retry_after: str | None) -> Unavailable:
    """A pool's error as an exception again, with its own words."""
    try:
        message = without_folders(str(orjson.loads(body)["error"]["message"]))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        message = "the pool could not answer"
    kinds: dict[str, type[Unavailable]] = {
        "over_capacity": OverCapacity,
        "expert_failed": ExpertFailed,
        "engine_dead": EngineDead,
        "engine_restarting": EngineRestarting,
    }
    return kinds.get(code, PoolGone)(message, retry_after_s=float(retry_after or 1))
