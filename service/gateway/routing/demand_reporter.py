"""Telling pools of unmet demand: what gateways would have sent them, were all resident."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from service.broker.demand import pool_for_demand
from service.broker.pool_state import PoolView
from service.errors import PoolUnavailableError
from service.rpc.pool_directory import PoolDirectory

_TELL_S = 0.25


class DemandReporter:
    """Adds up, and tells each expert's to the one pool that should load it."""

    def __init__(self, directory: PoolDirectory, views: Callable[[], list[PoolView]]) -> None:
        self._directory = directory
        self._views = views
        self._amounts: dict[str, float] = {}
        self._telling: asyncio.Task[None] | None = None

    def add(self, experts: Iterable[str], amount: float) -> None:
        """These experts would have been worth so much more."""
        for expert in experts:
            self._amounts[expert] = self._amounts.get(expert, 0.0) + amount
        if self._amounts and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(_TELL_S)
        wanted, self._amounts = self._amounts, {}
        views = self._views()
        by_pool: dict[str, dict[str, float]] = {}
        for expert, amount in wanted.items():
            boot = pool_for_demand(expert, views)
            if boot:
                by_pool.setdefault(boot, {})[expert] = amount
        links = {link.address.boot: link for link in self._directory.links()}
        for boot, amounts in by_pool.items():
            if boot in links:
                # A pool that has just gone needs no telling.
                with suppress(PoolUnavailableError):
                    await links[boot].demand(amounts)

    async def close(self) -> None:
        """Say no more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
