"""The placement loop and pinning of a pool."""

from __future__ import annotations

import pytest

from service.config import SimulatedOptions
from service.engine.simulated_engine import SimulatedEngine
from service.errors import ConflictError
from service.pool import pool as module
from service.pool.pool import Pool
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from tests.support.polling import until


async def test_placement_loop_after_an_error_continues_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looks: list[int] = []

    def shared(self: Pool) -> list[SharedSlot]:
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
    assert [record.getMessage() for record in caplog.records] == ["unit placement failed"]


async def test_pin_beyond_host_bytes_of_all_slots_together_raises_conflict() -> None:
    gib = 1024**3
    pool = Pool("cpu")
    sizes = {"a": 1, "b": 2, "c": 2, "d": 1}
    for names in ("ab", "cd"):
        pool.add(
            SharedSlot(
                [Unit(name, (name,), size_bytes=sizes[name] * gib) for name in names],
                lambda unit: SimulatedEngine(tuple(sizes), SimulatedOptions()),
                SwapPolicy(host_bytes=5 * gib),
                capacity=1,
                max_waiting=1,
                start_guess_s=1.0,
                guess=UnitState(host_bytes=gib),
                changed=pool.changed,
            )
        )
    # Beside it the largest two others can take turns: 1 + 2 + 2.
    await pool.operate("pin", "a")
    with pytest.raises(ConflictError, match=r"6\.00 GiB .* swap\.host_bytes is 5\.00 GiB"):
        await pool.operate("pin", "d")
    # One that is pinned may be asked for again.
    await pool.operate("pin", "a")
    await pool.operate("unpin", "a")
    await pool.operate("pin", "d")
    assert {name for name, details in pool.details().items() if details["pinned"]} == {"d"}
