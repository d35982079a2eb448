"""A volatile store in a shared Redis, which must evict the least recently used entries."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import StoreUnavailableError
from service.store.redis_commands import RedisConnections

log = logging.getLogger("coe.store")

# Seconds without calls after Redis did not answer.
_PAUSE_S = 2.0


class RedisVolatileStore:
    """A `VolatileStore` in Redis. While Redis is unavailable, calls fail without waiting."""

    def __init__(self, url: str, *, prefix: str, timeout_s: float) -> None:
        self._connections = RedisConnections(url, timeout_s=timeout_s, what="the volatile store")
        self._prefix = f"{{{prefix}}}:v:"
        self._paused_until_s = 0.0
        self._last_error = ""

    async def get(self, name: str) -> bytes | None:
        redis = self._connections.redis
        found: bytes | None = await self._run(lambda: redis.get(self._prefix + name))
        return found

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        redis, ttl_ms = self._connections.redis, _ms(ttl_s)
        await self._run(lambda: redis.set(self._prefix + name, value, px=ttl_ms))

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        redis, ttl_ms = self._connections.redis, _ms(ttl_s)
        return bool(
            await self._run(lambda: redis.set(self._prefix + name, value, px=ttl_ms, nx=True))
        )

    async def delete(self, name: str) -> None:
        redis = self._connections.redis
        await self._run(lambda: redis.delete(self._prefix + name))

    async def close(self) -> None:
        await self._connections.close()

    async def _run(self, command: Callable[[], Awaitable[Any]]) -> Any:
        if time.monotonic() < self._paused_until_s:
            raise StoreUnavailableError(self._last_error, retry_after_s=_PAUSE_S)
        try:
            reply = await self._connections.run(command)
        except StoreUnavailableError as error:
            self._paused_until_s = time.monotonic() + _PAUSE_S
            if error.message != self._last_error:
                log.error(
                    "%s; response cache, votes and shared sessions are disabled meanwhile",
                    error.message,
                )
            self._last_error = error.message
            raise
        self._last_error = ""
        return reply


def _ms(ttl_s: float) -> int:
    return max(1, int(ttl_s * 1000))
