"""Several engines on one accelerator, one of them awake: for experts of different families.

vLLM's sleep mode moves a sleeping engine's weights to host memory (level 1) or throws them
away, to be read again (level 2); its KV cache goes either way, and captured graphs stay.
An expert's engine is started at its first swap, while the others sleep.
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
        """Give the accelerator's memory up, once running requests have ended."""

    async def wake(self) -> None:
        """Have it all back."""


class SleepingEngines:
    """Plays one engine that holds every unit, of which one runs.

    `units`: the experts of each unit, its own name first. `sizes`: bytes that a unit takes
    in host memory while it sleeps; none at level 2.
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
        """See `Engine.load`."""
        await self._engines[self._awake].load(expert, adapter)

    async def unload(self, expert: str) -> None:
        """See `Engine.unload`."""
        await self._engines[self._awake].unload(expert)

    async def run(self, request: EngineRequest, send: Send) -> None:
        """See `Engine.run`."""
        if request.expert not in self._units[self._awake]:
            raise ExpertFailedError(f"{request.expert!r} sleeps", retry_after_s=1)
        await self._engines[self._awake].run(request, send)

    async def load_to_host(self, expert: str) -> LoadResult:
        """Nothing can be loaded beside the one that is awake: what will sleep is counted."""
        return LoadResult(self._sizes.get(expert, 0), 0.0, starts=expert not in self._engines)

    async def swap_in(self, expert: str) -> SwapResult:
        """Put the running unit to sleep, and wake or start another's engine.

        Raises ExpertFailedError where that one can't start: the one that ran does again.
        """
        began_s = time.monotonic()
        before = self._engines[self._awake]
        await self._or_broken(before.sleep(), "it could not be put to sleep")
        engine = self._engines.get(expert)
        woken = engine is not None and engine.failure() is None
        if engine is not None and woken:
            await self._or_broken(engine.wake(), "it could not be woken")
        else:
            if engine is not None:
                # It died in its sleep: what is left of it goes before another comes.
                del self._engines[expert]
                await engine.stop()
            engine = self._build(expert)
            try:
                await engine.start()
                for name in self._units[expert]:
                    await engine.load(name)
            except CoeError:
                await engine.stop()
                await self._or_broken(before.wake(), "it could not be woken again")
                raise
            self._engines[expert] = engine
        self._awake = expert
        swap_s = time.monotonic() - began_s
        return SwapResult(swap_s, ok=True, method="sleep", started=not woken)

    async def _or_broken(self, act: Awaitable[None], what: str) -> None:
        try:
            await act
        except Exception as error:
            self._broken = what
            raise EngineDeadError(f"{what}: {error}") from error

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Stop a sleeping unit's engine."""
        del for_next
        if expert != self._awake and (engine := self._engines.pop(expert, None)) is not None:
            await engine.stop()

    def failure(self) -> str | None:
        """Why the one that is awake is dead, or None."""
        engine = self._engines.get(self._awake)
        return self._broken or (engine.failure() if engine is not None else None)

    async def stop(self) -> None:
        """Stop every engine."""
        for engine in self._engines.values():
            await engine.stop()
