"""What a pool knows of its experts' routers: told by engines, reckoned when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.engine.base import RoutingSample
from service.errors import ConflictError
from service.moe.load_statistics import CACHE_TIMES, Cacheability, cacheability
from service.moe.routing_counts import RoutingCounts
from service.telemetry import metrics
from service.telemetry.labels import MAX_SERIES
from service.telemetry.registry import MetricsRegistry

# Stretches that wait to be reckoned; of more, the eldest are left out.
_MOST_WAITING = 64


@dataclass(slots=True)
class _Known:
    tally: RoutingCounts
    waiting: list[NDArray[np.int16]] = field(default_factory=list)


class MoeCollector:
    """By expert. `every`: one step of how many is looked at; 0: none.

    `clock` gives s since 1970. Cacheability takes up to some 0.2 s for a stretch, so it is reckoned
    in a thread, and only when figures are asked for.
    """

    def __init__(self, every: int, clock: Callable[[], float]) -> None:
        self._every = every
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._reckoning = asyncio.Lock()

    def add_sample(self, chosen: RoutingSample) -> None:
        """An engine tells what its routers chose."""
        known = self._known.get(chosen.expert)
        shape = (chosen.layers, chosen.experts, chosen.top_k)
        if known is None or (known.tally.layers, known.tally.experts, known.tally.top_k) != shape:
            known = self._known[chosen.expert] = _Known(self._nothing(chosen))
        if chosen.load is None:
            return
        tally = known.tally
        known.tally = replace(
            tally, tokens=tally.tokens + chosen.tokens, load=tally.load + chosen.load
        )
        known.waiting = [*known.waiting, *chosen.stretches][-_MOST_WAITING:]

    def _nothing(self, chosen: RoutingSample) -> RoutingCounts:
        layers = len(chosen.layers)
        return RoutingCounts(
            chosen.layers,
            chosen.experts,
            chosen.top_k,
            self._every,
            min(chosen.experts, CACHE_TIMES * chosen.top_k),
            self._clock(),
            0,
            np.zeros((layers, chosen.experts), np.int64),
            Cacheability.none(layers),
        )

    def forget(self, expert: str) -> None:
        """Another model has this name from now on, or none."""
        self._known.pop(expert, None)

    async def reckon(self) -> None:
        """Bring cacheability up to what was heard."""
        async with self._reckoning:
            for known in list(self._known.values()):
                waiting, known.waiting = known.waiting, []
                if not waiting:
                    continue
                before = known.tally
                # A steered model may give a token more than the cache was meant for.
                width = min(before.experts, max(one.shape[2] for one in waiting))
                cache = max(before.cache, width)
                more = await asyncio.to_thread(_reckon, waiting, before.experts, cache)
                now = known.tally  # more may have been heard meanwhile
                known.tally = replace(now, cache=cache, cacheability=now.cacheability + more)

    async def tally(self, expert: str) -> RoutingCounts:
        """Of one expert that this pool has.

        Raises ConflictError with the reason where there is none.
        """
        if not self._every:
            raise ConflictError(
                f"the routers of {expert!r} are not looked at: its pool has no vllm.moe_capture"
            )
        await self.reckon()
        known = self._known.get(expert)
        if known is None:
            raise ConflictError(f"no engine has told of the routers of {expert!r} yet")
        if not known.tally.layers:
            raise ConflictError(f"expert {expert!r} is not a mixture of experts: it has no routers")
        if not known.tally.tokens:
            raise ConflictError(
                f"nothing was seen of the routers of {expert!r} yet: one step of {self._every} is "
                "looked at, and what was seen is told every 10 s"
            )
        return known.tally

    def read(self, meter: MetricsRegistry) -> None:
        """Put what is known into the metrics."""
        for metric in (
            metrics.MOE_IMBALANCE,
            metrics.MOE_ENTROPY,
            metrics.MOE_SEGMENT_ROUTING,
            metrics.MOE_SEGMENT_CACHE_HITS,
        ):
            meter.forget(metric)
        meter.forget(metrics.MOE_ROUTED_TOKENS)
        room = MAX_SERIES
        for expert, known in self._known.items():
            tally = known.tally
            if not tally.tokens:
                continue
            meter.total(metrics.MOE_TOKENS, tally.tokens, expert)
            if tally.load.size <= room:
                room -= tally.load.size
                for (place, routed), count in np.ndenumerate(tally.load):
                    layer = tally.layers[place]
                    meter.total(
                        metrics.MOE_ROUTED_TOKENS, int(count), expert, str(layer), str(routed)
                    )
            for place, layer in enumerate(tally.layers):
                one = tally.balance(place)
                for metric, value in (
                    (metrics.MOE_IMBALANCE, one.imbalance),
                    (metrics.MOE_ENTROPY, one.entropy),
                    (metrics.MOE_SEGMENT_ROUTING, one.srp),
                    (metrics.MOE_SEGMENT_CACHE_HITS, one.sch),
                ):
                    if value is not None:
                        meter.put(metric, value, expert, str(layer))


def _reckon(stretches: list[NDArray[np.int16]], experts: int, cache: int) -> Cacheability:
    first, *others = (cacheability(one, experts, cache=cache) for one in stretches)
    return sum(others, first)
