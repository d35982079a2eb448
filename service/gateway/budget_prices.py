"""Budgets as the choice sees them: a shadow price for each, and what may still be promised.

Counts and caps are the ledger's; here is a copy of them, renewed twice a second while requests
come, and every ten seconds else because other gateways spend them too. Each budget has a
`BudgetPacer`. How many requests came is shared between gateways in the ledger's store, because
what is left of a budget is for the requests of all of them.
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
from service.broker.ledger import BudgetState, Ledger
from service.broker.selection import Selection
from service.errors import StoreUnavailableError
from service.store.names import join_name
from service.store.protocol import Granted, StoreClaim, UsageNote
from service.tasks import cancel_and_wait
from service.types import Tenant

log = logging.getLogger("coe.spending")

_RENEW_S = 0.5
# As often without any request.
RENEW_IDLE_S = 10.0
# Keys with a budget of their own whose price is kept: those that were shown last.
_MOST_KEYS = 1024
# How much longer than its window what is shared of it is kept.
_LONGER_S = 3600


class BudgetPrices:
    """Prices the budgets of one gateway's requests. It outlives a config, see `follow`.

    Args:
        ledger: Counts them.
        clock: Seconds since 1970.
    """

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = time.time) -> None:
        self._ledger = ledger
        self._clock = clock
        self._pacers: dict[str, BudgetPacer] = {}
        self._states: dict[str, BudgetState] = {}
        # By whose they are: names of everybody's budgets, and of each tenant's.
        self._common: list[str] = []
        self._of_tenant: dict[str, list[str]] = {}
        self._keys: OrderedDict[str, Tenant] = OrderedDict()
        # When the first of the windows ends.
        self._ends_s = math.inf
        self._renewing: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
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

    def observe(self, tenant: Tenant, selection: Selection) -> None:
        """The options of one request."""
        if tenant.key and tenant.limits.budget is not None:
            self._shown(tenant)
        names = self._concern(tenant)
        if names:
            now_s = self._clock()
            worth, cost = selection.net_quality, selection.cost
            for name in names:
                pacer = self._pacers[name]
                pacer.observe(worth, cost)
                if pacer.due():
                    pacer.reprice(_purse(self._states[name]), now_s)
        self.renew()

    def _shown(self, tenant: Tenant) -> None:
        """A key with a budget of its own was shown."""
        if tenant.key not in self._keys:
            # Nothing is known of it yet: don't wait.
            self._renewed_s = -math.inf
            if len(self._keys) >= _MOST_KEYS:
                self._keys.popitem(last=False)
        self._keys[tenant.key] = tenant
        self._keys.move_to_end(tenant.key)

    def renew(self) -> None:
        """Ask the ledger again, if that is some time ago."""
        now_s = time.monotonic()
        if not (self._ledger.has_budgets or self._keys) or now_s - self._renewed_s < _RENEW_S:
            return
        if self._renewing is None or self._renewing.done():
            self._renewed_s = now_s
            self._renewing = asyncio.create_task(self.look())

    async def look(self) -> None:
        """Read every budget, tell other gateways of our requests and hear of theirs, reprice."""
        try:
            self._take(await self._ledger.state(list(self._keys.values())))
            await self._share()
        except StoreUnavailableError:
            log.warning("budgets can't be read; their last prices stand")
            return
        now_s = self._clock()
        for name, state in self._states.items():
            if self._pacers[name].stale(purse := _purse(state), now_s):
                self._pacers[name].reprice(purse, now_s)

    def _take(self, states: dict[str, BudgetState]) -> None:
        """These are the budgets now."""
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
                pacer.reprice(_purse(state), now_s)

    async def _share(self) -> None:
        """Add up the requests of all gateways, in the store. Raises StoreUnavailableError."""
        now_s, store = self._clock(), self._ledger.store
        names = []
        for name, state in self._states.items():
            pacer = self._pacers[name]
            if pacer.starts_s != state.starts_s or not pacer.asked:
                continue  # a window that is over is left behind first, by repricing
            names.append(name)
            piece, count = pacer.untold(now_s)
            if count:
                keep_s = int(state.ends_s - state.starts_s) + _LONGER_S
                note = UsageNote(_arrivals_name(name, state), {str(piece): count}, keep_s)
                await store.settle(_NOTHING, (), note)
        found = await store.counts([_arrivals_name(name, self._states[name]) for name in names])
        for name, counts in zip(names, found, strict=True):
            self._pacers[name].heard({int(piece): count for piece, count in counts.items()})

    def _concern(self, tenant: Tenant) -> list[str]:
        """The names of the budgets that a tenant's requests are charged to."""
        if not self._states:
            return []
        if self._clock() >= self._ends_s:
            self._roll()
        names = [*self._common, *self._of_tenant.get(tenant.name, ())]
        if (own := f"key/{tenant.key}") in self._states:
            names.append(own)
        return names

    def _roll(self) -> None:
        """Windows are over: until the ledger has told, the next ones are as long and untouched."""
        now_s = self._clock()
        for name, state in self._states.items():
            if now_s < state.ends_s:
                continue
            span_s = state.ends_s - state.starts_s
            starts_s = state.ends_s + (now_s - state.ends_s) // span_s * span_s
            fresh = replace(state, spent=0.0, starts_s=starts_s, ends_s=starts_s + span_s)
            self._states[name] = fresh
            self._pacers[name].reprice(_purse(fresh), now_s)
        self._ends_s = min(state.ends_s for state in self._states.values())
        self._renewed_s = -math.inf

    def prices(self) -> list[tuple[str, float, float]]:
        """Return each budget's name, shadow price and remaining share.

        Budgets of single keys are left out.
        """
        return [
            (name, self._pacers[name].price, _purse(state).left / state.amount)
            for name, state in self._states.items()
            if not state.key
        ]

    async def start(self) -> None:
        """Read the budgets for the first time, and then now and then."""
        await self.look()
        self._following = asyncio.create_task(self._look_on())

    async def follow(self, ledger: Ledger) -> None:
        """Go on with the budgets of another config; what is known of those it shares stays."""
        self._ledger = ledger
        await self.look()

    async def _look_on(self) -> None:
        while True:
            await asyncio.sleep(RENEW_IDLE_S)
            self.renew()

    async def stop(self) -> None:
        """Ask no more."""
        await cancel_and_wait(self._following, self._renewing)


# What notes are settled with that belong to no claim.
_NOTHING = Granted(StoreClaim("", ()), 0, (), ())


def _arrivals_name(budget: str, state: BudgetState) -> str:
    return join_name("arrivals", budget, f"{state.starts_s:.0f}")


def _purse(state: BudgetState) -> BudgetSnapshot:
    return BudgetSnapshot(state.amount, state.spent, state.starts_s, state.ends_s, state.reserved)
