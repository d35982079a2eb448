"""Shadow prices of budgets: keys with their own budgets, new windows, store outages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from service.broker.limit_and_budget_ledger import Ledger, UsageBound
from service.broker.selection import Selection
from service.config import Config
from service.errors import StoreUnavailableError
from service.gateway import budget_prices as module
from service.gateway.budget_prices import BudgetPrices
from service.store.memory_store import MemoryStore
from service.store.store_interface import Account, AccountBalance
from service.types import NOBODY, Limits, Tenant, Usage

DAY = 86_400.0
KEY = Tenant("acme", "k1", limits=Limits(budget=5, period="day"))


class Offer:
    """A better answer for one unit of cost, as `BudgetPrices` reads it."""

    net_quality = np.array([0.5, 1.0])
    cost = np.array([0.0, 1.0])


OFFER = cast(Selection, Offer())


class Clock:
    now_s = 100 * DAY

    def __call__(self) -> float:
        return self.now_s


def site(
    clock: Clock, store: MemoryStore | None = None, **config: Any
) -> tuple[Ledger, BudgetPrices]:
    given = Config.model_validate(
        {"experts": {"a": {"model": "m"}}, "pools": {"p": {"engine": "simulated"}}, **config}
    )
    store = MemoryStore(clock) if store is None else store
    ledger = Ledger(given, store)
    return ledger, BudgetPrices(ledger, store, clock=clock)


async def spend(ledger: Ledger, tenant: Tenant, cost: float, name: str) -> None:
    held = await ledger.reserve(name, tenant, UsageBound(0, 1, prompt_cost=cost))
    await ledger.settle(held, Usage(1, 1, cost))


async def test_cost_price_of_a_key_s_own_budget_rises_as_it_is_spent() -> None:
    clock = Clock()
    ledger, spending = site(clock)
    await spending.start()
    assert spending.cost_price(KEY) == 0
    await spend(ledger, KEY, 4.9, "r")
    for _ in range(40):
        clock.now_s += 60
        spending.observe(KEY, OFFER)
        await spending.refresh()
    assert spending.left(KEY) == pytest.approx(0.1)
    assert spending.cost_price(KEY) >= 0.5, "nobody takes the better answer at this price"
    other = Tenant("acme", "k2", limits=Limits(budget=5, period="day"))
    assert spending.cost_price(other) == spending.cost_price(Tenant("acme", "k3")) == 0
    assert list(spending.prices()) == [], "a single key's budget is in no metric"
    await spending.stop()


async def test_cost_price_of_a_key_is_the_sum_of_all_its_budgets() -> None:
    clock = Clock()
    ledger, spending = site(
        clock,
        tenants={"acme": {"budget": {"amount": 5, "period": "day"}}, "other": {}},
        budgets={"all": {"amount": 5, "period": "day"}},
    )
    await spending.start()
    await spend(ledger, KEY, 4.9, "r")
    for _ in range(40):
        clock.now_s += 60
        spending.observe(KEY, OFFER)
        await spending.refresh()
    prices = dict((name, price) for name, price, _ in spending.prices())
    assert set(prices) == {"all", "tenant/acme"}
    own = spending.cost_price(KEY) - sum(prices.values())
    assert own >= 0.5
    assert spending.cost_price(Tenant("acme")) == pytest.approx(sum(prices.values()))
    assert spending.cost_price(Tenant("other")) == pytest.approx(prices["all"])
    assert spending.cost_price(NOBODY) == pytest.approx(prices["all"])
    await spending.stop()


async def test_budget_prices_remember_a_bounded_number_of_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_KEYS", 10)
    clock = Clock()
    _, spending = site(clock)
    for i in range(50):
        spending.observe(Tenant("acme", f"k{i}", limits=Limits(budget=5)), OFFER)
    await spending.refresh()
    assert set(spending._pacers) == {f"key/k{i}" for i in range(40, 50)}
    await spending.stop()


async def test_cost_price_in_a_new_window_starts_from_an_untouched_budget() -> None:
    """Yesterday's budget was spent early; today's would pay for all, from the first request on."""
    clock = Clock()
    ledger, spending = site(clock, budgets={"all": {"amount": 20, "period": "day"}})
    await spending.start()
    await spend(ledger, NOBODY, 20, "all of it")
    for i in range(32):
        clock.now_s = (100 + i / 64) * DAY
        spending.observe(NOBODY, OFFER)
        await spending.refresh()
    assert spending.cost_price(NOBODY) >= 0.5
    good = 0
    for i in range(15):
        clock.now_s = (101 + (i + 0.5) / 15) * DAY
        if spending.cost_price(NOBODY) < 0.5:
            assert spending.left(NOBODY) == 20 - good
            await spend(ledger, NOBODY, 1, f"r{i}")
            good += 1
        spending.observe(NOBODY, OFFER)
        await spending.refresh()
    assert good >= 13
    await spending.stop()


async def test_budget_prices_during_a_store_outage_stay_and_are_refreshed_later() -> None:
    class Gone(MemoryStore):
        gone = True

        async def balances(self, accounts: Sequence[Account]) -> list[AccountBalance]:
            if self.gone:
                raise StoreUnavailableError("it is away")
            return await super().balances(accounts)

    clock = Clock()
    store = Gone(clock)
    _, spending = site(clock, store, budgets={"all": {"amount": 1, "period": "day"}})
    await spending.start()
    assert spending.cost_price(NOBODY) == 0
    spending.observe(NOBODY, OFFER)
    store.gone = False
    spending._renewed_s = float("-inf")
    spending.observe(NOBODY, OFFER)
    assert spending._renewing is not None
    await spending._renewing
    assert [name for name, *_ in spending.prices()] == ["all"]
    await spending.stop()


async def test_budget_prices_arrivals_at_one_gateway_raise_the_price_at_another() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    ledger, one = site(clock, store, budgets={"all": {"amount": 20, "period": "day"}})
    two = BudgetPrices(ledger, store, clock=clock)
    await one.start()
    await two.start()
    for i in range(200):
        clock.now_s = (100 + i / 400) * DAY
        one.observe(NOBODY, OFFER)
        if i % 20 == 0:
            two.observe(NOBODY, OFFER)
        await one.refresh()
        await two.refresh()
    # Ten requests came to the second one: for itself alone they could all have the better answer.
    assert two.cost_price(NOBODY) == pytest.approx(one.cost_price(NOBODY)) == pytest.approx(0.5)
    late = BudgetPrices(ledger, store, clock=clock)
    await late.start()
    late.observe(NOBODY, OFFER)
    await late.refresh()
    assert late.cost_price(NOBODY) == pytest.approx(0.5), "one that has just come knows it, too"
    for each in (one, two, late):
        await each.stop()
