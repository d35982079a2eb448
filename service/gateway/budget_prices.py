"""Shadow prices of budgets, and how much of each budget is left.

The ledger owns the counts. A copy of them is renewed twice a second while requests arrive, and
otherwise every ten seconds, because other gateways spend the same budgets. Each budget has a
`BudgetPacer`. Gateways share the number of requests through the store, because the rest
of a budget is for the requests of all of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

from service.broker.budget_pacing import BudgetPacer, BudgetSnapshot
from service.broker.limit_and_budget_ledger import BudgetState, Ledger
from service.broker.selection import Selection
from service.errors import StoreUnavailableError
from service.store.record_names import join_name
from service.store.store_interface import Granted, Store, StoreClaim, UsageNote
from service.task_cancellation import cancel_and_wait
from service.types import Tenant

log = logging.getLogger("coe.spending")

_RENEW_S = 0.5
# The same without any request.
RENEW_IDLE_S = 10.0
# Prices are kept for this many keys with a budget of their own, the most recently used.
_MAX_KEYS = 1024
# Shared counts are kept for this long after the end of their window.
_KEEP_AFTER_WINDOW_S = 3600


class BudgetPrices:
    """Prices the budgets of one gateway's requests. It outlives a config (`use_ledger`).

    Args:
        ledger: Counts limits and budgets.
        store: Gateways share their counts of requests in it.
        clock: Returns seconds since 1970.
    """

    def __init__(
        self, ledger: Ledger, store: Store, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._ledger = ledger
        self._store = store
        self._clock = clock
        self._pacers: dict[str, BudgetPacer] = {}
        self._states: dict[str, BudgetState] = {}
        # Names of the budgets that all tenants share, and of each tenant's own.
        self._common: list[str] = []
        self._of_tenant: dict[str, list[str]] = {}
        self._keys: OrderedDict[str, Tenant] = OrderedDict()
        # The earliest end of a window.
        self._ends_s = math.inf
        self._renewing: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._renewed_s = -math.inf

    def cost_price(self, tenant: Tenant) -> float:
        """The tenant's price of cost, in quality per unit: the sum of its budgets' prices."""
        return sum(self._pacers[name].price for name in self._budgets_of(tenant))

    def left(self, tenant: Tenant) -> float:
        """Units of cost that the tenant's budgets still allow; inf without any budget."""
        states = [self._states[name] for name in self._budgets_of(tenant)]
        return min(
            (max(0.0, state.amount - state.spent - state.reserved) for state in states),
            default=math.inf,
        )

    def observe(self, tenant: Tenant, selection: Selection) -> None:
        """Take the candidates of one request into account."""
        if tenant.key and tenant.limits.budget is not None:
            self._remember_key(tenant)
        names = self._budgets_of(tenant)
        if names:
            now_s = self._clock()
            worth, cost = selection.net_quality, selection.cost
            for name in names:
                pacer = self._pacers[name]
                pacer.observe(worth, cost)
                if pacer.due():
                    pacer.reprice(_snapshot(self._states[name]), now_s)
        self.renew()

    def _remember_key(self, tenant: Tenant) -> None:
        """Keep prices for a key with a budget of its own."""
        if tenant.key not in self._keys:
            # Its budget is not known yet, so the next renewal comes at once.
            self._renewed_s = -math.inf
            if len(self._keys) >= _MAX_KEYS:
                self._keys.popitem(last=False)
        self._keys[tenant.key] = tenant
        self._keys.move_to_end(tenant.key)

    def renew(self) -> None:
        """Read the ledger again in the background, if the last time was long enough ago."""
        now_s = time.monotonic()
        if not (self._ledger.has_budgets or self._keys) or now_s - self._renewed_s < _RENEW_S:
            return
        if self._renewing is None or self._renewing.done():
            self._renewed_s = now_s
            self._renewing = asyncio.create_task(self.refresh())

    async def refresh(self) -> None:
        """Read every budget, exchange request counts with other gateways, and reprice."""
        try:
            self._replace_states(await self._ledger.state(list(self._keys.values())))
            await self._share()
        except StoreUnavailableError:
            log.warning("cannot read budgets; keeping the last shadow prices")
            return
        now_s = self._clock()
        for name, state in self._states.items():
            if self._pacers[name].stale(snapshot := _snapshot(state), now_s):
                self._pacers[name].reprice(snapshot, now_s)

    def _replace_states(self, states: dict[str, BudgetState]) -> None:
        """Take over the budgets as the ledger has them now."""
        self._states = states
        self._ends_s = min((state.ends_s for state in states.values()), default=math.inf)
        self._common, self._of_tenant = [], {}
        for name, state in states.items():
            if state.tenant is None:
                self._common.append(name)
            elif not state.key:
                self._of_tenant.setdefault(state.tenant, []).append(name)
        for name in self._pacers.keys() - states.keys():
            del self._pacers[name]
        now_s = self._clock()
        for name, state in states.items():
            pacer = self._pacers.get(name)
            if pacer is None:
                pacer = self._pacers[name] = BudgetPacer()
                pacer.reprice(_snapshot(state), now_s)

    async def _share(self) -> None:
        """Exchange request counts with other gateways through the store.

        Raises:
            StoreUnavailableError: The store can't be reached.
        """
        now_s, store = self._clock(), self._store
        names = []
        for name, state in self._states.items():
            pacer = self._pacers[name]
            if pacer.starts_s != state.starts_s or not pacer.has_requests:
                continue  # repricing has to leave the window that is over first
            names.append(name)
            piece, count = pacer.unreported(now_s)
            if count:
                keep_s = int(state.ends_s - state.starts_s) + _KEEP_AFTER_WINDOW_S
                note = UsageNote(_arrivals_name(name, state), {str(piece): count}, keep_s)
                await store.settle(_NO_CLAIM, (), note)
        found = await store.counts([_arrivals_name(name, self._states[name]) for name in names])
        for name, counts in zip(names, found, strict=True):
            self._pacers[name].set_arrivals({int(piece): count for piece, count in counts.items()})

    def _budgets_of(self, tenant: Tenant) -> list[str]:
        """The names of the budgets that a tenant's requests are charged to."""
        if not self._states:
            return []
        if self._clock() >= self._ends_s:
            self._roll_windows()
        names = [*self._common, *self._of_tenant.get(tenant.name, ())]
        if (own := f"key/{tenant.key}") in self._states:
            names.append(own)
        return names

    def _roll_windows(self) -> None:
        """Start new windows, as long and unspent, until the ledger is read again."""
        now_s = self._clock()
        for name, state in self._states.items():
            if now_s < state.ends_s:
                continue
            span_s = state.ends_s - state.starts_s
            starts_s = state.ends_s + (now_s - state.ends_s) // span_s * span_s
            fresh = replace(state, spent=0.0, starts_s=starts_s, ends_s=starts_s + span_s)
            self._states[name] = fresh
            self._pacers[name].reprice(_snapshot(fresh), now_s)
        self._ends_s = min(state.ends_s for state in self._states.values())
        self._renewed_s = -math.inf

    def prices(self) -> list[tuple[str, float, float]]:
        """Return each budget's name, shadow price and remaining share.

        Budgets of single keys are left out.
        """
        return [
            (name, self._pacers[name].price, _snapshot(state).left / state.amount)
            for name, state in self._states.items()
            if not state.key
        ]

    async def start(self) -> None:
        """Read the budgets, and start to renew them."""
        await self.refresh()
        self._following = asyncio.create_task(self._renew_when_idle())

    async def use_ledger(self, ledger: Ledger) -> None:
        """Use the ledger of another config; budgets that both have keep their prices."""
        self._ledger = ledger
        await self.refresh()

    async def _renew_when_idle(self) -> None:
        while True:
            await asyncio.sleep(RENEW_IDLE_S)
            self.renew()

    async def stop(self) -> None:
        """Stop the background tasks."""
        await cancel_and_wait(self._following, self._renewing)


# Usage notes that belong to no claim are settled with this.
_NO_CLAIM = Granted(StoreClaim("", ()), 0, (), ())


def _arrivals_name(budget: str, state: BudgetState) -> str:
    return join_name("arrivals", budget, f"{state.starts_s:.0f}")


def _snapshot(state: BudgetState) -> BudgetSnapshot:
    return BudgetSnapshot(state.amount, state.spent, state.starts_s, state.ends_s, state.reserved)
