"""A store for data that may be lost: cached answers, votable replies and sessions.

It never has limits, budgets or keys. It is separate from the main store, so that it can neither
evict budgets nor fill the memory that claims need. In the gateway's process the least recently used
entries are evicted first. A separate Redis does the same with `maxmemory-policy allkeys-lru`.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

# The approximate bytes of Python's overhead for an entry, in addition to its name and value.
_ENTRY_BYTES = 200


class VolatileStore(Protocol):
    """A cache of small values. Any value may be evicted at any time."""

    async def get(self, name: str) -> bytes | None:
        """Return the value, or None where it does not exist.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """

    async def put(self, name: str, value: bytes, *, ttl_s: float) -> None:
        """Keep a value for at most `ttl_s` seconds.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        """Keep a value unless a value of this name exists. Return whether it was kept.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """

    async def delete(self, name: str) -> None:
        """Forget a value, if it exists.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """

    async def close(self) -> None:
        """Close every connection."""


class MemoryVolatileStore:
    """A `VolatileStore` in memory: an LRU cache of at most `max_bytes`."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._values: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size_bytes = 0

    async def get(self, name: str) -> bytes | None:
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
        self._drop(name)
        self._values[name] = (self._clock() + ttl_s, value)
        self.size_bytes += _size(name, value)
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._values)))

    async def add(self, name: str, value: bytes, *, ttl_s: float) -> bool:
        if await self.get(name) is not None:
            return False
        await self.put(name, value, ttl_s=ttl_s)
        return True

    async def delete(self, name: str) -> None:
        self._drop(name)

    async def close(self) -> None:
        pass

    def _drop(self, name: str) -> None:
        if (found := self._values.pop(name, None)) is not None:
            self.size_bytes -= _size(name, found[1])


def _size(name: str, value: bytes) -> int:
    return _ENTRY_BYTES + len(name) + len(value)
