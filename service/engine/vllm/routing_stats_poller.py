"""Polls an engine's worker for the choices of its gates and passes them to the pool."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import numpy as np

from service.config import MoeCapture
from service.engine.engine_interface import EngineObserver, RoutingSample
from service.errors import CoeError

log = logging.getLogger("coe.engine")

INTERVAL_S = 10.0
_TIMEOUT_S = 5.0
_LAST_TIMEOUT_S = 1.0

CallWorker = Callable[..., Awaitable[Any]]


class RoutingStatsPoller:
    """Polls the gates of one engine's worker from `start` to `stop`.

    Args:
        call_worker: A function that calls a method of the worker by name.
        observer: Receives the samples.
        options: The settings of the sampling.

    Attributes:
        has_news: An event that the engine sets after each request. Without it there is no poll.
    """

    def __init__(
        self, call_worker: CallWorker, observer: EngineObserver, options: MoeCapture
    ) -> None:
        self._call_worker = call_worker
        self._observer = observer
        self._options = options
        self._shape: tuple[tuple[int, ...], int, int] = ((), 0, 0)
        self._polling: asyncio.Task[None] | None = None
        self.has_news = False

    async def start(self, running: str, experts: Iterable[str]) -> None:
        """Start to sample.

        Args:
            running: The expert whose weights the engine has now.
            experts: All experts that the engine may run.
        """
        options = self._options
        answer = await self._call_worker(
            "coe_capture", running, options.every, options.stretches, options.tokens
        )
        if "refused" in answer:
            # The expert answers as well without statistics.
            log.warning("vllm.moe_capture: nothing is sampled: %s", answer["refused"])
            return
        self._shape = tuple(answer["layers"]), int(answer["experts"]), int(answer["top_k"])
        for expert in experts:
            self._observer.on_routing_sample(RoutingSample(expert, *self._shape))
        if self._shape[0]:
            self._polling = asyncio.create_task(self._poll_forever())

    async def poll(self) -> None:
        """Fetch the samples since the last poll and pass them on.

        Raises:
            CoeError: The worker does not answer.
        """
        layers, experts, top_k = self._shape
        samples: dict[str, Any] = await self._call_worker("coe_captured")
        for expert, sample in samples.items():
            load = np.frombuffer(sample["load"], np.int64).reshape(len(layers), experts)
            stretches = tuple(
                np.frombuffer(data, np.int16).reshape(shape) for *shape, data in sample["stretches"]
            )
            self._observer.on_routing_sample(
                RoutingSample(expert, layers, experts, top_k, sample["tokens"], load, stretches)
            )

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if self.has_news:
                self.has_news = False
                await self._try_poll(_TIMEOUT_S)

    async def _try_poll(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self.poll()
        except Exception as error:
            # The next poll may succeed. The text of an unknown error may quote a prompt.
            kind = error.message if isinstance(error, CoeError) else type(error).__name__
            log.warning("MoE routing capture failed: %s", kind)

    async def stop(self, *, poll: bool) -> None:
        """Stop polling. It is safe to call this twice, and before `start`.

        Args:
            poll: Whether to poll once more before the end.
        """
        polling, self._polling = self._polling, None
        if polling is not None:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            if poll:
                await self._try_poll(_LAST_TIMEOUT_S)
