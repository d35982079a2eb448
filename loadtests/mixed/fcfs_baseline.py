"""The baseline: strictly first come, first served across experts, with LRU in host memory.

This is a swapper that knows only names. The request at the head of the queue decides which expert
runs. Requests behind it for the same expert join it, as long as no request between them is for
another expert.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.engine.engine_interface import SwappingEngine


class Fcfs:
    """One engine and one queue. `most_held`: experts in host memory, including the running one."""

    def __init__(
        self, engine: SwappingEngine, first: str, *, capacity: int, most_held: int | None
    ) -> None:
        self._engine = engine
        self._running = first
        self._capacity = capacity
        self._most_held = most_held
        self._held: OrderedDict[str, None] = OrderedDict({first: None})
        self._queue: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._in_flight = 0
        self._event = asyncio.Event()
        self.switches = 0

    @property
    def running(self) -> str:
        """The expert that runs."""
        return self._running

    @asynccontextmanager
    async def lease(self, expert: str) -> AsyncIterator[float]:
        """Wait for one's turn; yields how long that took, in s."""
        began_s = time.monotonic()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((expert, turn))
        self._event.set()
        await turn
        try:
            yield time.monotonic() - began_s
        finally:
            self._in_flight -= 1
            self._event.set()

    async def run(self) -> None:
        """Serve the queue until cancelled."""
        while True:
            self._event.clear()
            while self._queue:
                expert, turn = self._queue[0]
                if expert != self._running:
                    if self._in_flight:
                        break
                    await self._swap(expert)
                if self._in_flight >= self._capacity:
                    break
                self._queue.popleft()
                self._in_flight += 1
                turn.set_result(None)
            await self._event.wait()

    async def _swap(self, expert: str) -> None:
        if expert not in self._held:
            while self._most_held is not None and len(self._held) >= self._most_held:
                oldest = next(name for name in self._held if name != self._running)
                await self._engine.evict(oldest)
                del self._held[oldest]
            await self._engine.load_to_host(expert)
        if not (await self._engine.swap_in(expert)).ok:
            raise RuntimeError(f"{expert}: not the weights that were loaded")
        self._held[expert] = None
        self._held.move_to_end(expert)
        self._running = expert
        self.switches += 1
