"""Several engines on one accelerator, one of them awake: for experts of different families.

vLLM's sleep mode moves the weights of a sleeping engine to host memory (level 1), or discards them
and reads them again (level 2). Its KV cache is discarded at both levels; captured graphs stay. An
expert's engine is started at its first swap, while the others sleep.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from service.engine.base import Engine, EngineReport, EngineRequest, LoadResult, Send, SwapResult
from service.errors import CoeError, EngineDeadError, ExpertFailedError


class Sleeper(Engine, Protocol):
    """An engine that can sleep."""

    async def sleep(self) -> None:
        """Give up the accelerator's memory once running requests have ended."""

    async def wake(self) -> None:
        """Take the memory back, with the weights in it."""


class SleepingEngines:
    """One engine a unit, of which one is awake. They appear as one engine that swaps units.

    Args:
        first: The unit that starts awake.
        units: Names of each unit's experts, its own name first.
        build: Makes a unit's engine.
        sizes: Bytes of host memory that a unit takes while it sleeps; none at level 2.
    """

    def __init__(
        self,
        first: str,
        units: Mapping[str, tuple[str, ...]],
        build: Callable[[str], Sleeper],
        sizes: Mapping[str, int],
    ) -> None:
        self._units = units
        self._build = build
        self._sizes = sizes
        self._awake = first
        self._engines: dict[str, Sleeper] = {}
        self._broken: str | None = None

    @property
    def swappable_experts(self) -> frozenset[str]:
        """All units: each has an engine of its own."""
        return frozenset(self._units)

    async def start(self) -> EngineReport:
        """Start the first unit's engine. Raises ExpertFailedError."""
        engine = self._engines[self._awake] = self._build(self._awake)
        return await engine.start()

    async def load(self, expert: str, adapter: str | None = None) -> None:
        await self._engines[self._awake].load(expert, adapter)

    async def unload(self, expert: str) -> None:
        await self._engines[self._awake].unload(expert)

    async def run(self, request: EngineRequest, send: Send) -> None:
        if request.expert not in self._units[self._awake]:
            raise ExpertFailedError(f"{request.expert!r} sleeps", retry_after_s=1)
        await self._engines[self._awake].run(request, send)

    async def load_to_host(self, expert: str) -> LoadResult:
        """Report the size of a unit that will sleep: nothing loads beside the awake engine."""
        return LoadResult(self._sizes.get(expert, 0), 0.0, starts=expert not in self._engines)

    async def swap_in(self, expert: str) -> SwapResult:
        """Put the running unit to sleep, and wake or start another's engine.

        Raises:
            ExpertFailedError: The other engine can't start; the first one is awake again.
            EngineDeadError: An engine can't sleep or wake.
        """
        began_s = time.monotonic()
        before = self._engines[self._awake]
        await self._must_succeed(before.sleep(), "it could not be put to sleep")
        engine = self._engines.get(expert)
        woken = engine is not None and engine.failure() is None
        if engine is not None and woken:
            await self._must_succeed(engine.wake(), "it could not be woken")
        else:
            if engine is not None:
                # It died asleep: its remains are cleared up before another engine starts.
                del self._engines[expert]
                await engine.stop()
            engine = self._build(expert)
            try:
                await engine.start()
                for name in self._units[expert]:
                    await engine.load(name)
            except CoeError:
                await engine.stop()
                await self._must_succeed(before.wake(), "it could not be woken again")
                raise
            self._engines[expert] = engine
        self._awake = expert
        swap_s = time.monotonic() - began_s
        return SwapResult(swap_s, ok=True, method="sleep", started=not woken)

    async def _must_succeed(self, call: Awaitable[None], failure: str) -> None:
        try:
            await call
        except Exception as error:
            self._broken = failure
            raise EngineDeadError(f"{failure}: {error}") from error

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Stop a sleeping unit's engine."""
        if expert != self._awake and (engine := self._engines.pop(expert, None)) is not None:
            await engine.stop()

    def failure(self) -> str | None:
        """Why the awake engine is dead, or None."""
        engine = self._engines.get(self._awake)
        return self._broken or (engine.failure() if engine is not None else None)

    async def stop(self) -> None:
        """Stop every engine."""
        for engine in self._engines.values():
            await engine.stop()
