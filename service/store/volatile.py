"""What may be lost: kept answers, and replies that can be voted on. Never a limit, budget or key.

It stands apart from the store that counts, so that however much of it there is, no budget
is forgotten and nothing that counts is refused for want of room. In the gateway's process the
entries used longest ago go first; a Redis of its own does the same when it is told
`maxmemory-policy allkeys-lru`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

# About what Python needs for an entry beside its name and value.
_ENTRY_BYTES = 200


class VolatileStore(Protocol):
    """Small values for a while. Any of them may be gone at any time."""

    async def get(self, name: str) -> bytes | None:
        """A value, if it is still there. Raises StoreUnavailableError."""

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        """Keep a value, for `ttl_s` at most. Raises StoreUnavailableError."""

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        """Keep a value unless there is one: whether it was kept. Raises StoreUnavailableError."""

    async def close(self) -> None:
        """Close every connection."""


class MemoryVolatile:
    """See `VolatileStore`: in this process, at most `most_bytes`; what was used last stays."""

    def __init__(self, most_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_bytes = most_bytes
        self._clock = clock
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size_bytes = 0

    async def get(self, name: str) -> bytes | None:
        """See `VolatileStore`."""
        found = self._values.get(name)
        if found is None:
            return None
        until_s, value = found
        if until_s <= self._clock():
            self._drop(name)
            return None
        self._values.move_to_end(name)
        return value

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        """See `VolatileStore`."""
        self._drop(name)
        self._values[name] = (self._clock() + ttl_s, value)
        self.size_bytes += _size(name, value)
        while self.size_bytes > self._most_bytes:
            self._drop(next(iter(self._values)))

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        """See `VolatileStore`."""
        if await self.get(name) is not None:
            return False
        await self.put(name, value, ttl_s=ttl_s)
        return True

    async def close(self) -> None:
        """See `VolatileStore`."""

    def _drop(self, name: str) -> None:
        if (found := self._values.pop(name, None)) is not None:
            self.size_bytes -= _size(name, found[1])


def _size(name: str, value: bytes) -> int:
    return _ENTRY_BYTES + len(name) + len(value)
