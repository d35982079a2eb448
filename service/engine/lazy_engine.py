"""An engine that is made when it starts, because its weights may have to be downloaded first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.engine.engine_interface import (
    EngineReport,
    EngineRequest,
    LoadResult,
    RestingEngine,
    Send,
    SwappingEngine,
    SwapResult,
)
from service.errors import EngineRestartingError


class LazyEngine:
    """Makes an engine in a thread when it starts, and forwards every call to that engine.

    Args:
        make: A function that makes the engine. It may block.
    """

    def __init__(self, make: Callable[[], SwappingEngine]) -> None:
        self.make = make
        self._made: SwappingEngine | None = None

    def _engine(self) -> SwappingEngine:
        if self._made is None:
            raise EngineRestartingError("the engine has not been started")
        return self._made

    async def start(self) -> EngineReport:
        """Make the engine, then start it. The errors of both steps are raised."""
        self._made = await asyncio.to_thread(self.make)
        return await self._made.start()

    async def load(self, expert: str, adapter: str | None = None) -> None:
        await self._engine().load(expert, adapter)

    async def unload(self, expert: str) -> None:
        await self._engine().unload(expert)

    async def run(self, request: EngineRequest, send: Send) -> None:
        await self._engine().run(request, send)

    def failure(self) -> str | None:
        return self._made.failure() if self._made is not None else None

    async def stop(self) -> None:
        if self._made is not None:
            await self._made.stop()

    @property
    def swappable_experts(self) -> frozenset[str]:
        return self._engine().swappable_experts

    async def load_to_host(self, expert: str) -> LoadResult:
        return await self._engine().load_to_host(expert)

    async def swap_in(self, expert: str) -> SwapResult:
        return await self._engine().swap_in(expert)

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        await self._engine().evict(expert, for_next=for_next)

    @property
    def can_rest(self) -> bool:
        """Whether the engine that was made can rest."""
        return isinstance(self._made, RestingEngine) and self._made.can_rest

    async def rest(self) -> None:
        engine = self._engine()
        assert isinstance(engine, RestingEngine)
        await engine.rest()

    async def resume(self) -> None:
        engine = self._engine()
        assert isinstance(engine, RestingEngine)
        await engine.resume()
