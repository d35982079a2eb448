"""What may be lost, in a Redis that gateways share; told to evict what was used longest ago."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from service.errors import StoreUnavailableError
from service.store.redis_client import RedisConnections

log = logging.getLogger("coe.store")

# How long nobody asks a Redis that did not answer.
_REST_S = 2.0


class RedisVolatile:
    """See `VolatileStore`: in a Redis that gateways share. Nobody waits for one that is gone."""

    def __init__(self, url: str, *, prefix: str, timeout_s: float) -> None:
        self._connections = RedisConnections(url, timeout_s=timeout_s, what="the volatile store")
        self._prefix = f"{{{prefix}}}:v:"
        self._rests_until_s = 0.0
        self._why = ""

    async def get(self, name: str) -> bytes | None:
        """See `VolatileStore`."""
        redis = self._connections.redis
        found: bytes | None = await self._ask(lambda: redis.get(self._prefix + name))
        return found

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        """See `VolatileStore`."""
        redis, ttl_ms = self._connections.redis, _ms(ttl_s)
        await self._ask(lambda: redis.set(self._prefix + name, value, px=ttl_ms))

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        """See `VolatileStore`."""
        redis, ttl_ms = self._connections.redis, _ms(ttl_s)
        return bool(
            await self._ask(lambda: redis.set(self._prefix + name, value, px=ttl_ms, nx=True))
        )

    async def close(self) -> None:
        """See `VolatileStore`."""
        await self._connections.close()

    async def _ask(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        if time.monotonic() < self._rests_until_s:
            raise StoreUnavailableError(self._why, retry_after_s=_REST_S)
        try:
            told = await self._connections.ask(ask)
        except StoreUnavailableError as error:
            self._rests_until_s = time.monotonic() + _REST_S
            if error.message != self._why:
                log.error("%s; answers are not kept meanwhile, nor votes taken", error.message)
            self._why = error.message
            raise
        self._why = ""
        return told


def _ms(ttl_s: float) -> int:
    return max(1, int(ttl_s * 1000))
