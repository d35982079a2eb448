"""The in-process store forgets accounts that no longer count."""

from __future__ import annotations

from service.store.limit_windows import DAY, MINUTE
from service.store.memory_store import MemoryStore
from service.store.store_interface import Account, Charge, Granted, StoreClaim

DAY_S = 86_400.0


async def claimed(store: MemoryStore, account: Account) -> Granted:
    got = await store.reserve(StoreClaim(account.name, (Charge(account, 1),)))
    assert isinstance(got, Granted)
    return got


async def test_memory_store_forgets_accounts_in_which_nothing_counts() -> None:
    now_s = 1_700_000_000.0
    store = MemoryStore(lambda: now_s)
    for i in range(100):
        account = Account(f"vote/{i}", 1, DAY if i % 2 else MINUTE)
        await store.settle(await claimed(store, account), [1], None)
    open_ = await claimed(store, Account("long", 1, DAY))
    now_s += 2 * DAY_S
    last = Account("last", 1, DAY)
    await store.settle(await claimed(store, last), [1], None)
    assert store._accounts.keys() == {"last"}
    # One that outlasted its window, and its account: there is nothing to charge it to.
    await store.settle(open_, [1], None)
    (balance,) = await store.balances([last])
    assert (balance.spent, balance.reserved) == (1, 0)
