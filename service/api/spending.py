"""Budgets as the choice sees them: a shadow price for each, and what may still be promised.

Counts and caps are the ledger's; here is a copy of them, renewed twice a second while requests
come, and a `Pacer` for each budget.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from service.broker.choice import Weighed
from service.broker.ledger import BudgetState, Ledger
from service.broker.pacing import Pacer, Purse
from service.errors import StoreGone
from service.store.ending import end
from service.types import Tenant

log = logging.getLogger("coe.spending")

_RENEW_S = 0.5


class Spending:
    """Prices the budgets of one gateway's requests. `any_budgets`: whether there are any."""

    def __init__(self, ledger: Ledger, *, any_budgets: bool) -> None:
        self._ledger = ledger
        self._any = any_budgets
        self._pacers: dict[str, Pacer] = {}
        self._states: dict[str, BudgetState] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._renewed_s = -math.inf

    def cost_price(self, tenant: Tenant) -> float:
        """Quality per unit of cost for this tenant: the sum of its budgets' prices."""
        return sum(self._pacers[name].price for name in self._concern(tenant))

    def left(self, tenant: Tenant) -> float:
        """Units of cost that its budgets still allow, as far as known; inf without any."""
        states = [self._states[name] for name in self._concern(tenant)]
        return min(
            (max(0.0, state.amount - state.spent - state.reserved) for state in states),
            default=math.inf,
        )

    def offered(self, tenant: Tenant, weighed: Weighed) -> None:
        """The options of one request."""
        if not self._any:
            return
        now_s = time.time()
        worth, cost = weighed.worth, weighed.cost
        for name in self._concern(tenant):
            pacer = self._pacers[name]
            pacer.offered(worth, cost)
            if pacer.due():
                pacer.reprice(_purse(self._states[name]), now_s)
        self.renew()

    def renew(self) -> None:
        """Ask the ledger again, if that is some time ago."""
        now_s = time.monotonic()
        if not self._any or now_s - self._renewed_s < _RENEW_S:
            return
        if self._renewing is None or self._renewing.done():
            self._renewed_s = now_s
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        try:
            self._states = await self._ledger.state()
        except StoreGone:
            log.warning("budgets can't be read; their last prices stand")
            return
        for name, state in self._states.items():
            pacer = self._pacers.setdefault(name, Pacer())
            if pacer.due():
                pacer.reprice(_purse(state), time.time())

    def _concern(self, tenant: Tenant) -> list[str]:
        if not self._any:
            return []
        return [name for name, state in self._states.items() if state.tenant in (None, tenant.name)]

    def prices(self) -> list[tuple[str, float, float]]:
        """Every budget's name, shadow price, and the share of it that is left."""
        return [
            (name, self._pacers[name].price, _purse(state).left / state.amount)
            for name, state in self._states.items()
        ]

    async def start(self) -> None:
        """Read the budgets for the first time."""
        if self._any:
            await self._renew()

    async def stop(self) -> None:
        """Ask no more."""
        await end(self._renewing)


def _purse(state: BudgetState) -> Purse:
    return Purse(state.amount, state.spent, state.starts_s, state.ends_s, state.reserved)
