"""Routing statistics of a pool's mixture-of-experts models.

Engines send samples of what their gates chose; figures are computed when they are read.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from service.engine.engine_interface import RoutingSample
from service.errors import ConflictError
from service.moe.load_statistics import CACHE_TIMES, Cacheability, cacheability
from service.moe.routing_counts import RoutingCounts
from service.telemetry import metric_declarations
from service.telemetry.label_values import MAX_SERIES
from service.telemetry.metrics_registry import MetricsRegistry

# Token stretches that wait for computation. With more, the oldest are dropped.
_MAX_PENDING = 64


@dataclass(slots=True)
class _ExpertState:
    counts: RoutingCounts
    pending: list[NDArray[np.int16]] = field(default_factory=list)


class MoeCollector:
    """Collects routing statistics by expert.

    Cacheability takes up to 0.2 s for a stretch, so it is computed in a thread, and only when
    figures are read.

    Args:
        every: One of this many steps is sampled; 0: none.
        clock: Returns s since 1970.
    """

    def __init__(self, every: int, clock: Callable[[], float]) -> None:
        self._every = every
        self._clock = clock
        self._states: dict[str, _ExpertState] = {}
        self._computing = asyncio.Lock()

    def add_sample(self, sample: RoutingSample) -> None:
        """Add an engine's sample of its gates' choices."""
        state = self._states.get(sample.expert)
        shape = (sample.layers, sample.experts, sample.top_k)
        if (
            state is None
            or (state.counts.layers, state.counts.experts, state.counts.top_k) != shape
        ):
            state = self._states[sample.expert] = _ExpertState(self._empty_counts(sample))
        if sample.load is None:
            return
        counts = state.counts
        state.counts = replace(
            counts, tokens=counts.tokens + sample.tokens, load=counts.load + sample.load
        )
        state.pending = [*state.pending, *sample.stretches][-_MAX_PENDING:]

    def _empty_counts(self, sample: RoutingSample) -> RoutingCounts:
        layers = len(sample.layers)
        return RoutingCounts(
            sample.layers,
            sample.experts,
            sample.top_k,
            self._every,
            min(sample.experts, CACHE_TIMES * sample.top_k),
            self._clock(),
            0,
            np.zeros((layers, sample.experts), np.int64),
            Cacheability.none(layers),
        )

    def forget(self, expert: str) -> None:
        """Drop the statistics of an expert whose model was changed or removed."""
        self._states.pop(expert, None)

    async def compute(self) -> None:
        """Compute the cacheability of all samples that have arrived."""
        async with self._computing:
            for state in list(self._states.values()):
                pending, state.pending = state.pending, []
                if not pending:
                    continue
                before = state.counts
                # A steered model may choose more routed experts per token than the cache holds.
                width = min(before.experts, max(stretch.shape[2] for stretch in pending))
                cache = max(before.cache, width)
                more = await asyncio.to_thread(_cacheability, pending, before.experts, cache)
                now = state.counts  # more samples may have arrived meanwhile
                state.counts = replace(now, cache=cache, cacheability=now.cacheability + more)

    async def tally(self, expert: str) -> RoutingCounts:
        """Return the statistics of one expert of this pool.

        Raises:
            ConflictError: There are none; the message says why.
        """
        if not self._every:
            raise ConflictError(
                f"the gates of {expert!r} are not sampled: its pool has no vllm.moe_capture"
            )
        await self.compute()
        state = self._states.get(expert)
        if state is None:
            raise ConflictError(f"no engine has sent routing samples of {expert!r} yet")
        if not state.counts.layers:
            raise ConflictError(f"expert {expert!r} is not a mixture of experts: it has no gates")
        if not state.counts.tokens:
            raise ConflictError(
                f"no routing sample of {expert!r} has arrived yet: one step in {self._every} is "
                "sampled, and engines send their samples every 10 s"
            )
        return state.counts

    def read(self, registry: MetricsRegistry) -> None:
        """Put the statistics into the metrics."""
        for metric in (
            metric_declarations.MOE_IMBALANCE,
            metric_declarations.MOE_ENTROPY,
            metric_declarations.MOE_SEGMENT_ROUTING,
            metric_declarations.MOE_SEGMENT_CACHE_HITS,
        ):
            registry.forget(metric)
        registry.forget(metric_declarations.MOE_ROUTED_TOKENS)
        room = MAX_SERIES
        for expert, state in self._states.items():
            counts = state.counts
            if not counts.tokens:
                continue
            registry.total(metric_declarations.MOE_TOKENS, counts.tokens, expert)
            if counts.load.size <= room:
                room -= counts.load.size
                for (index, routed_expert), count in np.ndenumerate(counts.load):
                    layer = counts.layers[index]
                    registry.total(
                        metric_declarations.MOE_ROUTED_TOKENS,
                        int(count),
                        expert,
                        str(layer),
                        str(routed_expert),
                    )
            for index, layer in enumerate(counts.layers):
                balance = counts.balance(index)
                for metric, value in (
                    (metric_declarations.MOE_IMBALANCE, balance.imbalance),
                    (metric_declarations.MOE_ENTROPY, balance.entropy),
                    (metric_declarations.MOE_SEGMENT_ROUTING, balance.srp),
                    (metric_declarations.MOE_SEGMENT_CACHE_HITS, balance.sch),
                ):
                    if value is not None:
                        registry.put(metric, value, expert, str(layer))


def _cacheability(stretches: list[NDArray[np.int16]], experts: int, cache: int) -> Cacheability:
    first, *others = (cacheability(stretch, experts, cache=cache) for stretch in stretches)
    return sum(others, first)
