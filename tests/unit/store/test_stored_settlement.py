"""Settlements survive being written down."""

from __future__ import annotations

from service.store.limit_windows import DAY, MINUTE, fixed
from service.store.store_interface import (
    Account,
    Charge,
    Granted,
    Settlement,
    StoreClaim,
    UsageNote,
)
from service.store.stored_settlement import dumps, loads


def test_settlements_charge_the_same_after_being_stored() -> None:
    accounts = [Account("a", 10, MINUTE), Account("b", 2**40, DAY), Account("c", 5, fixed(60))]
    claim = StoreClaim("id", tuple(Charge(account, 3, 0.5) for account in accounts), 9, 1)
    note = UsageNote("usage", {"requests": 1}, 7)
    given = [
        Settlement(Granted(claim, 9, (4, 5, 6), (1, 2, 3)), (7, 8, 2**41), note),
        Settlement(Granted(StoreClaim("none", ()), 0, (), ()), ()),
    ]
    found = loads(dumps(given))
    for before, after in zip(given, found, strict=True):
        assert after.granted.claim.id == before.granted.claim.id
        assert after.used == before.used
        assert after.note == before.note
        assert after.granted.amounts == before.granted.amounts
        assert after.granted.starts_ms == before.granted.starts_ms
        lines = before.granted.claim.lines
        assert [line.account for line in after.granted.claim.lines] == [x.account for x in lines]
    assert found[0].free().used == (0, 0, 0)
    assert found[0].free().note is None
