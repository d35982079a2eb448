"""The rules that place units in slots, one by one."""

from __future__ import annotations

from dataclasses import replace

from service.pool.swap_planner import SlotView, SwapPolicy, UnitView
from service.pool.unit_placement import Move, Place, next_move
from service.types import Residency

POLICY = SwapPolicy(min_stay_s=1.0)
ALL = frozenset("abcd")


def unit(name: str, waiting: int = 0, demand: float = 0.0, held: bool = True) -> UnitView:
    return UnitView(
        name=name,
        tier=Residency.HOST if held else Residency.DISK,
        waiting=waiting,
        waiting_tokens=100 * waiting,
        oldest_s=0.0,
        demand_per_s=demand,
        host_bytes=10,
        fill_s=2.0,
        swap_s=0.1 if held else 2.1,
        pinned=False,
        start_s=30.0,
    )


def place(
    running: str,
    *others: UnitView,
    busy: int = 0,
    waiting: int = 0,
    drain_s: float = 5.0,
    demand: float = 0.0,
    fits: frozenset[str] = ALL,
) -> Place:
    slot = SlotView(running, 10.0, busy, waiting, drain_s)
    runs = replace(unit(running, demand=demand), tier=Residency.DEVICE)
    return Place(slot, [runs, *others], fits, settled=True)


def test_next_move_waiting_unit_goes_to_an_idle_slot() -> None:
    busy = place("a", unit("b", waiting=1), busy=4)
    assert next_move([busy, place("c")], POLICY) == Move("b", 0, 1)
    # Not where it is sooner its turn than it is fetched.
    assert next_move([replace(busy, slot=replace(busy.slot, drain_s=0.5)), place("c")], POLICY) is (
        None
    )
    assert next_move([place("a", unit("b", waiting=1)), place("c")], POLICY) is None
    # Nor to one that has work, or is not settled, or needs another engine for it.
    assert next_move([busy, place("c", busy=1)], POLICY) is None
    assert next_move([busy, place("c", unit("d", waiting=1))], POLICY) is None
    assert next_move([busy, replace(place("c"), settled=False)], POLICY) is None
    assert next_move([busy, place("c", fits=frozenset("c"))], POLICY) is None


def test_next_move_long_wait_justifies_an_engine_start() -> None:
    busy = place("a", unit("b", waiting=1), busy=4, waiting=40, drain_s=10.0)
    assert next_move([busy, place("c", fits=frozenset("c"))], POLICY) == Move("b", 0, 1)


def test_next_move_running_pinned_or_loading_unit_stays() -> None:
    waits = unit("b", waiting=1)
    idle = place("c")
    assert next_move([place("a", replace(waits, pinned=True), busy=4), idle], POLICY) is None
    loading = replace(waits, tier=Residency.LOADING)
    assert next_move([place("a", loading, busy=4), idle], POLICY) is None
    own = place("a", busy=4, waiting=9)
    assert next_move([own, idle], POLICY) is None


def test_next_move_uneven_demand_moves_a_unit_where_the_gain_is_worth_it() -> None:
    heavy = place("a", unit("b", demand=3.0), unit("d", demand=1.0), demand=3.0)
    assert next_move([heavy, place("c", demand=0.5)], POLICY) == Move("b", 0, 1)
    # 7 against 3: b would only turn them round, d is too little to be worth a fetch.
    assert next_move([heavy, place("c", demand=6.0)], POLICY) is None
    assert next_move([heavy, place("c", fits=frozenset("c"))], POLICY) is None
