"""An engine's side of watching routers: asks its worker now and then, and tells the pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import numpy as np

from service.config import MoeCapture
from service.engine.base import EngineObserver, RoutingSample
from service.errors import CoeError, ExpertFailedError

log = logging.getLogger("coe.engine")

EVERY_S = 10.0
_ANSWER_S = 5.0
_LAST_S = 1.0

Ask = Callable[..., Awaitable[Any]]


class RoutingStatsPoller:
    """Follows the routers of one engine's worker from `begin` to `end`.

    `ask` calls a method of the worker. `asked` is set whenever a request has ended: while
    none does, nothing is new.
    """

    def __init__(self, ask: Ask, watch: EngineObserver, options: MoeCapture) -> None:
        self._ask = ask
        self._watch = watch
        self._options = options
        self._shape: tuple[tuple[int, ...], int, int] = ((), 0, 0)
        self._following: asyncio.Task[None] | None = None
        self.asked = False

    async def begin(self, running: str, experts: Iterable[str]) -> None:
        """Start: `running` is in the engine, any of `experts` may come.

        Raises ExpertFailedError.
        """
        options = self._options
        told = await self._ask(
            "coe_capture", running, options.every, options.stretches, options.tokens
        )
        if "refused" in told:
            raise ExpertFailedError(f"vllm.moe_capture: {told['refused']}")
        self._shape = tuple(told["layers"]), int(told["experts"]), int(told["top_k"])
        for expert in experts:
            self._watch.on_routing_sample(RoutingSample(expert, *self._shape))
        if self._shape[0]:
            self._following = asyncio.create_task(self._follow())

    async def look(self) -> None:
        """Ask what was chosen, and tell. Raises CoeError where the worker does not answer."""
        layers, experts, top_k = self._shape
        told: dict[str, Any] = await self._ask("coe_captured")
        for expert, one in told.items():
            load = np.frombuffer(one["load"], np.int64).reshape(len(layers), experts)
            stretches = tuple(
                np.frombuffer(data, np.int16).reshape(shape) for *shape, data in one["stretches"]
            )
            self._watch.on_routing_sample(
                RoutingSample(expert, layers, experts, top_k, one["tokens"], load, stretches)
            )

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            if self.asked:
                self.asked = False
                await self._try(_ANSWER_S)

    async def _try(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.look()
        except Exception as error:
            # Whatever the worker says: the next look may go well. Its text may be anything.
            kind = error.message if isinstance(error, CoeError) else type(error).__name__
            log.warning("the routers of an expert could not be looked at: %s", kind)

    async def end(self, *, look: bool) -> None:
        """Look no more, or, with `look`, once. Safe to call twice, and before `begin`."""
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            if look:
                await self._try(_LAST_S)
