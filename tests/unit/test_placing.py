"""A pool's looks at who should be in which slot."""

from __future__ import annotations

import pytest

from service.pool import pool as module
from service.pool.pool import Pool
from service.pool.swap_slot import SwapSlot
from tests.support.waiting import until


async def test_a_look_that_goes_wrong_is_not_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    def shared(self: Pool) -> list[SwapSlot]:
        looks.append(len(looks))
        if len(looks) == 2:  # the first is at the start
            raise KeyError("what nobody thought of")
        return []

    monkeypatch.setattr(module, "_PLACE_S", 0.001)
    monkeypatch.setattr(Pool, "shared", property(shared))
    pool = Pool("cpu")
    pool.start()
    try:
        await until(lambda: len(looks) > 3, "it looks again")
    finally:
        await pool.stop(0)
    assert [record.getMessage() for record in caplog.records] == ["placing failed"]
