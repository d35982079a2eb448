"""Reports unmet demand to pools, which load experts by it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from service.broker.pool_state import PoolView
from service.broker.unmet_demand import pool_for_demand
from service.errors import PoolUnavailableError
from service.rpc.pool_directory import PoolDirectory

_REPORT_DELAY_S = 0.25


class DemandReporter:
    """Accumulates unmet demand by expert, and reports it to the pool that should load it."""

    def __init__(self, directory: PoolDirectory, views: Callable[[], list[PoolView]]) -> None:
        self._directory = directory
        self._views = views
        self._amounts: dict[str, float] = {}
        self._reporting: asyncio.Task[None] | None = None

    def add(self, experts: Iterable[str], amount: float) -> None:
        """Add an amount of unmet demand, in quality, to each of these experts."""
        for expert in experts:
            self._amounts[expert] = self._amounts.get(expert, 0.0) + amount
        if self._amounts and (self._reporting is None or self._reporting.done()):
            self._reporting = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        await asyncio.sleep(_REPORT_DELAY_S)
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
                # A pool that has just gone needs no report.
                with suppress(PoolUnavailableError):
                    await links[boot].demand(amounts)

    async def close(self) -> None:
        """Stop reporting."""
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
