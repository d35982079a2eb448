"""Several engines on one accelerator, of which one is awake. It serves experts of all families.

vLLM's sleep mode moves the weights of a sleeping engine to host memory (level 1), or discards them
and reads them again (level 2). Both levels discard the KV cache and keep captured graphs. An
expert's engine is started at its first swap, while the other engines sleep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from service.engine.engine_interface import (
    Engine,
    EngineReport,
    EngineRequest,
    LoadResult,
    Send,
    SwapResult,
)
from service.errors import CoeError, EngineDeadError, ExpertFailedError

# torch reads the first of these that is set.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The size up to which blocks of pinned memory are rounded. vLLM's own pool has blocks of 2 MB.
_ROUNDING, _ROUNDED_MB = "pinned_max_round_threshold_mb", 2


def exact_pinned_blocks(environment: Mapping[str, str]) -> tuple[str, str]:
    """Return a variable for an engine that sleeps, so that its weights take their own size.

    torch rounds a block of pinned memory up to a power of two, and keeps it. At level 1 a sleeping
    engine's weights would take up to twice their size, for as long as it lives.

    Args:
        environment: The environment of the engine.

    Returns:
        The name and the value of the variable with torch's settings of allocators.
    """
    name = next((name for name in _ALLOCATOR_VARIABLES if name in environment), "")
    settings = [environment[name]] if name and environment[name] else []
    if not any(_ROUNDING in setting for setting in settings):
        settings.append(f"{_ROUNDING}:{_ROUNDED_MB}")
    return name or _ALLOCATOR_VARIABLES[0], ",".join(settings)


class Sleeper(Engine, Protocol):
    """An engine that can sleep."""

    async def sleep(self) -> None:
        """Free the accelerator's memory after running requests have ended."""

    async def wake(self) -> None:
        """Allocate the memory again, and restore the weights."""


class SleepingEngines:
    """An engine for each unit, of which one is awake. Together they act as one swapping engine.

    Args:
        first: The unit that starts awake.
        units: The names of each unit's experts. The unit's own name comes first.
        build: A function that makes a unit's engine.
        sizes: By unit, bytes of host memory that it takes while it sleeps; empty at level 2.
        turn: A lock that all of a pool's slots share. vLLM measures a GPU's memory while an engine
            starts, and fails where another engine frees some meanwhile.
    """

    def __init__(
        self,
        first: str,
        units: Mapping[str, tuple[str, ...]],
        build: Callable[[str], Sleeper],
        sizes: Mapping[str, int],
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._turn = turn or asyncio.Lock()
        self._units = units
        self._build = build
        self._sizes = sizes
        self._awake = first
        self._engines: dict[str, Sleeper] = {}
        self._broken: str | None = None
        self._rests = False

    @property
    def can_rest(self) -> bool:
        """Always: its engines were started with vLLM's sleep mode."""
        return True

    async def rest(self) -> None:
        """Put the awake engine to sleep as well.

        Raises:
            EngineDeadError: It can't sleep.
        """
        async with self._turn:
            if not self._rests:
                engine = self._engines[self._awake]
                await self._must_succeed(engine.sleep(), "it could not be put to sleep")
                self._rests = True

    async def resume(self) -> None:
        """Wake the engine that was awake last.

        Raises:
            EngineDeadError: It can't be woken.
        """
        async with self._turn:
            if self._rests:
                engine = self._engines[self._awake]
                await self._must_succeed(engine.wake(), "it could not be woken")
                self._rests = False

    @property
    def swappable_experts(self) -> frozenset[str]:
        """All units, because each unit has its own engine."""
        return frozenset(self._units)

    async def start(self) -> EngineReport:
        """Start the first unit's engine.

        Raises:
            ExpertFailedError: The engine can't start.
        """
        async with self._turn:
            engine = self._engines[self._awake] = await asyncio.to_thread(self._build, self._awake)
            return await engine.start()

    async def load(self, expert: str, adapter: str | None = None) -> None:
        await self._engines[self._awake].load(expert, adapter)

    async def unload(self, expert: str) -> None:
        await self._engines[self._awake].unload(expert)

    async def run(self, request: EngineRequest, send: Send) -> None:
        if self._rests or request.expert not in self._units[self._awake]:
            raise ExpertFailedError(f"{request.expert!r} sleeps", retry_after_s=1)
        await self._engines[self._awake].run(request, send)

    async def load_to_host(self, expert: str) -> LoadResult:
        """Report a unit's size. Nothing is loaded beside the awake engine."""
        return LoadResult(self._sizes.get(expert, 0), 0.0, starts=expert not in self._engines)

    async def swap_in(self, expert: str) -> SwapResult:
        """Put the running unit to sleep, and wake or start another unit's engine.

        Raises:
            ExpertFailedError: The other engine can't start. The running unit is awake again.
            EngineDeadError: An engine can't sleep or wake.
        """
        async with self._turn:
            return await self._exchange(expert)

    async def _exchange(self, expert: str) -> SwapResult:
        began_s = time.monotonic()
        before = self._engines[self._awake]
        if not self._rests:
            await self._must_succeed(before.sleep(), "it could not be put to sleep")
        engine = self._engines.get(expert)
        woken = engine is not None and engine.failure() is None
        if engine is not None and woken:
            await self._must_succeed(engine.wake(), "it could not be woken")
        else:
            if engine is not None:
                # The engine died while it slept. It is stopped before another engine starts.
                del self._engines[expert]
                await engine.stop()
            engine = None
            try:
                engine = await asyncio.to_thread(self._build, expert)
                await engine.start()
                for name in self._units[expert]:
                    await engine.load(name)
            except CoeError:
                if engine is not None:
                    await engine.stop()
                await self._must_succeed(before.wake(), "it could not be woken again")
                self._rests = False
                raise
            self._engines[expert] = engine
        self._awake, self._rests = expert, False
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
        """Return why the awake engine is dead, or None."""
        engine = self._engines.get(self._awake)
        return self._broken or (engine.failure() if engine is not None else None)

    async def stop(self) -> None:
        """Stop every engine."""
        for engine in self._engines.values():
            await engine.stop()
