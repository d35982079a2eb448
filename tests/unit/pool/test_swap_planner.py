"""The planner's rules, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from service.pool.swap_planner import (
    CloseGate,
    SlotView,
    Stay,
    Step,
    SwapIn,
    SwapPolicy,
    UnitView,
    bounded,
    next_fetch,
    next_step,
    units_to_evict,
    units_to_keep,
    urgency,
)
from service.types import Residency

# Turns begin at four fifths of the bound: at 30 s.
POLICY = SwapPolicy(min_stay_s=1.0, max_wait_s=37.5, host_bytes=30)
RUNS = SlotView("a", stayed_s=5.0, running=0, waiting=0, drain_s=0.5)


def unit(
    name: str,
    *,
    tier: Residency = Residency.HOST,
    waiting: int = 0,
    oldest_s: float = 0.0,
    demand: float = 0.0,
    size: int = 10,
    swap_s: float = 0.05,
    fill_s: float = 2.0,
    pinned: bool = False,
    swappable: bool = True,
    wanted: bool = False,
    needs: str | None = None,
    batch: int = 0,
) -> UnitView:
    return UnitView(
        name=name,
        tier=tier,
        waiting=waiting,
        waiting_tokens=100 * waiting,
        oldest_s=oldest_s,
        demand_per_s=demand,
        host_bytes=size,
        fill_s=fill_s,
        swap_s=swap_s,
        pinned=pinned,
        swappable=swappable,
        wanted=wanted,
        needs=needs,
        start_s=30.0,
        batch_waiting=batch,
    )


A = unit("a", tier=Residency.DEVICE)


def step(slot: SlotView, *units: UnitView, policy: SwapPolicy = POLICY) -> Step:
    return next_step(slot, [A, *units], policy)


# --- what next


def test_next_step_no_other_unit_waiting_stays() -> None:
    assert step(RUNS, unit("b")) == Stay()
    assert next_step(RUNS, [replace(A, waiting=3)], POLICY) == Stay()


def test_next_step_idle_slot_swaps_at_once_to_a_waiting_unit() -> None:
    fresh = replace(RUNS, stayed_s=0.0)
    assert step(fresh, unit("b", waiting=1)) == SwapIn("b", "queue served")


def test_next_step_serves_the_running_unit_s_queue_first() -> None:
    busy = replace(RUNS, running=8, waiting=1)
    assert step(busy, unit("b", waiting=50, oldest_s=20)) == Stay()


def test_next_step_more_waiting_than_running_closes() -> None:
    busy = replace(RUNS, running=4)
    assert step(busy, unit("b", waiting=3)) == Stay()
    assert step(busy, unit("b", waiting=4)) == CloseGate("b", "queue served")
    eager = replace(POLICY, crowding=2.0)
    assert step(busy, unit("b", waiting=4), policy=eager) == CloseGate("b", "queue served")
    slow = replace(POLICY, crowding=0.5)
    assert step(busy, unit("b", waiting=7), policy=slow) == Stay()


def test_next_step_arrivals_while_closing_do_not_reopen() -> None:
    closing = replace(RUNS, running=3, waiting=2, stayed_s=0.1, closing=True)
    assert isinstance(step(closing, unit("b", waiting=1)), CloseGate)
    assert isinstance(step(replace(closing, running=0), unit("b", waiting=1)), SwapIn)
    # Unless nobody wants the slot any more.
    assert step(closing, unit("b")) == Stay()


def test_next_step_before_min_stay_keeps_running() -> None:
    fresh = replace(RUNS, running=1, stayed_s=0.9)
    assert step(fresh, unit("b", waiting=9)) == Stay()
    assert isinstance(step(replace(fresh, stayed_s=1.0), unit("b", waiting=9)), CloseGate)
    # Even against the bound: else every swap would be followed by the next.
    assert step(fresh, unit("b", waiting=9, oldest_s=40)) == Stay()


def test_next_step_freshly_started_engine_stays_as_long_as_its_start_took() -> None:
    fresh = replace(RUNS, running=1, waiting=5, stayed_s=20)
    other = unit("b", waiting=1, oldest_s=40, swap_s=30.0, swappable=False)
    assert step(fresh, other) == Stay()
    assert step(replace(fresh, stayed_s=30), other) == CloseGate("b", "bound on waiting")


def test_next_step_closes_before_max_wait_is_exceeded() -> None:
    busy = replace(RUNS, running=8, waiting=20)
    assert step(busy, unit("b", waiting=1, oldest_s=29.4)) == Stay()
    late = unit("b", waiting=1, oldest_s=29.45)  # and 0.5 to drain, 0.05 to swap
    assert step(busy, late) == CloseGate("b", "bound on waiting")
    assert isinstance(step(replace(busy, running=0), late), SwapIn)


def test_next_step_several_waiting_units_closes_in_time_for_the_last() -> None:
    busy = replace(RUNS, running=8, waiting=20, drain_s=5.0)
    waiting = [unit(name, waiting=1, oldest_s=18.0) for name in "bcd"]
    assert step(busy, *waiting[:2]) == Stay()  # 18 + 2 · 5.05 < 30
    assert isinstance(step(busy, *waiting), CloseGate)  # 18 + 3 · 5.05 > 30


def test_next_step_among_overdue_units_the_oldest_is_first() -> None:
    many = unit("b", waiting=90, oldest_s=30)
    old = unit("c", waiting=1, oldest_s=31)
    assert step(RUNS, many, old).unit == "c"


def test_next_step_otherwise_the_most_urgent_unit_is_first() -> None:
    assert step(RUNS, unit("b", waiting=2), unit("c", waiting=1)).unit == "b"
    # Waiting counts, too, and an expensive swap against it.
    assert step(RUNS, unit("b", waiting=2), unit("c", waiting=1, oldest_s=9)).unit == "c"
    assert step(RUNS, unit("b", waiting=2, swap_s=0.5), unit("c", waiting=1)).unit == "c"
    assert urgency(unit("b", waiting=1, oldest_s=2), POLICY) == (100 + 2 * 50) / 0.05


def test_next_step_units_not_in_host_memory_do_not_close_the_slot() -> None:
    busy = replace(RUNS, running=2)
    for tier in (Residency.LOADING, Residency.DISK):
        assert step(busy, unit("b", tier=tier, waiting=9, oldest_s=40)) == Stay()
    loading = unit("b", tier=Residency.LOADING, waiting=9, oldest_s=40)
    assert step(RUNS, loading, unit("c", waiting=1)).unit == "c"


def test_next_step_unit_that_needs_another_engine_waits_for_a_free_slot() -> None:
    other = unit("b", tier=Residency.DISK, waiting=1, swappable=False, swap_s=30)
    assert step(RUNS, other) == SwapIn("b", "bound on waiting")
    assert isinstance(step(replace(RUNS, running=1, stayed_s=31), other), CloseGate)


# --- host memory


def test_to_keep_without_host_bytes_keeps_all_and_drops_nothing() -> None:
    policy = replace(POLICY, host_bytes=None)
    units = [A, *(unit(name, size=10**12) for name in "bcd")]
    assert units_to_keep(RUNS, units, policy) == {"a", "b", "c", "d"}
    assert units_to_evict(RUNS, units, policy, None) == []
    assert bounded(RUNS, units, policy) == units


def test_bounded_unit_that_does_not_fit_beside_the_running_one_needs_its_own_engine() -> None:
    big = unit("b", tier=Residency.DISK, size=21)
    fits = unit("c", tier=Residency.DISK, size=20)
    assert bounded(RUNS, [A, big, fits], POLICY) == [
        A,
        replace(big, swappable=False, swap_s=30.0),
        fits,
    ]
    # Pinned ones stay, so they take room, too; what is held already needs none.
    pinned = unit("p", pinned=True)
    held = unit("h", size=20)
    after = bounded(RUNS, [A, pinned, fits, held], POLICY)
    assert [u.swappable for u in after] == [True, True, False, True]


def test_to_keep_running_pinned_and_waiting_units_precede_demand() -> None:
    units = [
        A,
        unit("pinned", tier=Residency.DISK, pinned=True),
        unit("waiting", tier=Residency.DISK, waiting=1),
        unit("hot", demand=100.0),
    ]
    assert units_to_keep(RUNS, units, POLICY) == {"a", "pinned", "waiting"}
    assert units_to_evict(RUNS, units, POLICY, "waiting") == []
    tight = [*units[:1], unit("pinned", pinned=True), *units[2:]]
    assert units_to_evict(RUNS, tight, POLICY, "waiting") == ["hot"]


def test_to_keep_remaining_room_goes_by_demand_times_load_time() -> None:
    often = unit("often", demand=2.0, fill_s=1.0)
    dear = unit("dear", demand=1.0, fill_s=9.0)
    rare = unit("rare", demand=0.1, fill_s=9.0)
    assert units_to_keep(RUNS, [A, often, dear, rare], POLICY) == {"a", "often", "dear"}
    assert units_to_evict(RUNS, [A, often, dear, rare], POLICY, None) == ["rare"]


def test_to_keep_held_unit_stays_unless_another_is_clearly_better() -> None:
    held = unit("held", demand=1.0)
    better = unit("better", demand=1.4, tier=Residency.DISK)
    much = unit("much", demand=1.6, tier=Residency.DISK)
    policy = replace(POLICY, host_bytes=20)
    assert units_to_keep(RUNS, [A, held, better], policy) == {"a", "held"}
    assert units_to_keep(RUNS, [A, held, much], policy) == {"a", "much"}


def test_to_drop_running_and_fitting_pinned_unit_are_never_dropped() -> None:
    policy = replace(POLICY, host_bytes=20)
    units = [A, unit("pinned", pinned=True), unit("b"), unit("c", tier=Residency.LOADING)]
    assert units_to_evict(RUNS, units, policy, None) == ["b"]


def test_to_drop_pinned_unit_beyond_the_bound_is_dropped() -> None:
    units = [A, unit("pinned", pinned=True)]
    assert units_to_evict(RUNS, units, replace(POLICY, host_bytes=19), None) == ["pinned"]
    # The same where slots share a bound, and another needs its own room.
    shared = replace(POLICY, host_bytes=19, most_bytes=19)
    assert units_to_evict(RUNS, units, shared, None) == ["pinned"]


def test_to_drop_frees_no_more_than_needed() -> None:
    units = [A, unit("b", demand=1.0), unit("c", demand=2.0)]
    coming = unit("d", tier=Residency.DISK, waiting=1)
    assert units_to_evict(RUNS, [*units, coming], POLICY, "d") == ["b"]
    roomy = replace(POLICY, host_bytes=40)
    assert units_to_evict(RUNS, [*units, coming], roomy, "d") == []


# --- what to fetch


def test_next_fetch_waiting_unit_precedes_a_unit_in_demand() -> None:
    hot = unit("hot", tier=Residency.DISK, demand=50.0)
    waits = unit("waits", tier=Residency.DISK, waiting=1)
    assert next_fetch(RUNS, [A, hot, waits], POLICY) == "waits"
    assert next_fetch(RUNS, [A, hot], POLICY) == "hot"


def test_next_fetch_prefetches_nothing_while_the_running_unit_s_requests_wait() -> None:
    hot = unit("hot", tier=Residency.DISK, demand=50.0)
    assert next_fetch(replace(RUNS, waiting=1), [A, hot], POLICY) is None
    assert next_fetch(RUNS, [A, hot], replace(POLICY, prefetch=False)) is None
    assert next_fetch(RUNS, [A, unit("cold", tier=Residency.DISK)], POLICY) is None


def test_next_fetch_operator_s_unit_follows_waiting_units_and_precedes_the_rest() -> None:
    hot = unit("hot", tier=Residency.DISK, demand=50.0)
    wanted = unit("wanted", tier=Residency.DISK, wanted=True)
    waits = unit("waits", tier=Residency.DISK, waiting=1)
    nothing_ahead = replace(POLICY, prefetch=False)
    assert next_fetch(RUNS, [A, hot, wanted], nothing_ahead) == "wanted"
    assert next_fetch(replace(RUNS, waiting=1), [A, wanted], POLICY) == "wanted"
    assert next_fetch(RUNS, [A, hot, wanted], POLICY) == "wanted"
    assert next_fetch(RUNS, [A, waits, wanted], nothing_ahead) == "waits"
    assert next_fetch(RUNS, [A, replace(wanted, swappable=False)], nothing_ahead) is None


def test_to_keep_operator_s_unit_displaces_demand_but_never_waiting_units() -> None:
    held = [A, unit("b", demand=1.0), unit("c", demand=2.0)]
    wanted = unit("wanted", tier=Residency.DISK, wanted=True)
    assert units_to_keep(RUNS, [*held, wanted], POLICY) == {"a", "c", "wanted"}
    assert units_to_evict(RUNS, [*held, wanted], POLICY, "wanted") == ["b"]
    waiting = [A, unit("b", waiting=1), unit("c", waiting=1)]
    assert "wanted" not in units_to_keep(RUNS, [*waiting, wanted], POLICY)


def test_next_fetch_pinned_unit_is_fetched_without_demand() -> None:
    pinned = unit("p", tier=Residency.DISK, pinned=True)
    hot = unit("hot", tier=Residency.DISK, demand=50.0)
    assert next_fetch(RUNS, [A, hot, pinned], POLICY) == "p"


def test_next_fetch_two_waiting_units_do_not_evict_each_other() -> None:
    policy = replace(POLICY, host_bytes=20)
    arrived = unit("b", waiting=1)
    absent = unit("c", tier=Residency.DISK, waiting=5, swap_s=2.05)
    assert next_fetch(RUNS, [A, arrived, absent], policy) is None
    # Until it may wait too long: then it is the other's turn to wait.
    old = replace(absent, oldest_s=17.0)
    assert next_fetch(RUNS, [A, arrived, old], policy) == "c"
    assert units_to_evict(RUNS, [A, arrived, old], policy, "c") == ["b"]


def test_next_fetch_unit_that_needs_another_engine_is_not_fetched() -> None:
    other = unit("b", tier=Residency.DISK, waiting=1, swappable=False)
    assert next_fetch(RUNS, [A, other], POLICY) is None


# --- units that run on another's weights


def light(name: str, needs: str, **given: Any) -> UnitView:
    return unit(name, size=0, fill_s=0.01, needs=needs, **given)


def test_next_fetch_base_weights_precede_a_virtual_expert() -> None:
    waits = light("b1", "b", tier=Residency.DISK, waiting=1)
    absent, here = unit("b", tier=Residency.DISK), unit("b")
    assert next_fetch(RUNS, [A, absent, waits], POLICY) == "b"
    assert next_fetch(RUNS, [A, here, waits], POLICY) == "b1"
    coming = replace(absent, tier=Residency.LOADING)
    assert next_fetch(RUNS, [A, coming, waits], POLICY) is None
    # They could not be loaded, and are not tried now.
    assert next_fetch(RUNS, [A, waits], POLICY) is None


def test_to_drop_base_weights_go_with_their_virtual_experts_and_never_before() -> None:
    tight = replace(POLICY, host_bytes=20)
    b, b1, b2 = unit("b"), light("b1", "b"), light("b2", "b")
    c = unit("c", tier=Residency.DISK, waiting=1)
    assert units_to_evict(RUNS, [A, b, b1, b2, c], tight, "c") == ["b1", "b2", "b"]
    # a1 runs on what a has; so there is no room for c but b's.
    runs = replace(RUNS, running_unit="a1")
    a, a1 = unit("a"), light("a1", "a", tier=Residency.DEVICE)
    assert units_to_evict(runs, [a, a1, b, b1, c], tight, "c") == ["b1", "b"]
    assert units_to_evict(runs, [a, a1, c], replace(tight, host_bytes=10), "c") == []
    pinned = replace(b1, pinned=True)
    assert units_to_evict(runs, [a, a1, b, pinned, c], tight, "c") == []


def test_to_keep_demand_of_virtual_experts_counts_for_their_base() -> None:
    tight = replace(POLICY, host_bytes=20)
    b, c = unit("b", demand=1.0), unit("c", demand=2.0)
    assert units_to_keep(RUNS, [A, b, c], tight) == {"a", "c"}
    wanted = light("b1", "b", demand=5.0)
    assert units_to_keep(RUNS, [A, b, wanted, c], tight) == {"a", "b", "b1"}
    waits = light("b1", "b", tier=Residency.DISK, waiting=1)
    assert units_to_keep(RUNS, [A, replace(b, demand_per_s=0.0), waits, c], tight) == {
        "a",
        "b",
        "b1",
    }


def test_bounded_virtual_expert_of_the_running_base_needs_no_room() -> None:
    a1 = light("a1", "a", tier=Residency.DISK, waiting=1)
    alone = replace(POLICY, host_bytes=10)
    assert bounded(RUNS, [A, a1], alone)[1].swappable
    b, b1 = unit("b", tier=Residency.DISK), light("b1", "b", tier=Residency.DISK, waiting=1)
    found = bounded(RUNS, [A, b, b1], alone)
    assert [item.swappable for item in found] == [True, False, False]


# --- lines of batches


def test_next_step_batch_waits_until_people_have_left_the_running_unit() -> None:
    lines = unit("b", waiting=9, batch=9, oldest_s=1000.0, swap_s=3.0)
    for people in (
        replace(RUNS, running=1),
        replace(RUNS, waiting=1),
        replace(RUNS, people_ago_s=5.9),
        replace(RUNS, running=3, batch_running=2),
    ):
        assert step(people, lines) == Stay()
    assert step(replace(RUNS, people_ago_s=6.0), lines) == SwapIn("b", "queue served")


def test_next_step_people_take_the_slot_from_a_batch_at_once() -> None:
    busy = replace(RUNS, stayed_s=0.0, running=8, waiting=20, batch_running=8, batch_waiting=20)
    assert step(busy, unit("b", waiting=1)) == CloseGate("b", "queue served")
    # People's own work in the running unit goes on.
    theirs = replace(busy, waiting=21)
    assert step(theirs, unit("b", waiting=1)) == Stay()


def test_next_step_unit_of_people_comes_before_a_larger_one_of_a_batch() -> None:
    lines = unit("b", waiting=50, batch=50, oldest_s=500.0)
    assert step(RUNS, lines, unit("c", waiting=1)) == SwapIn("c", "queue served")


def test_next_step_batch_serves_its_running_unit_before_the_next() -> None:
    own = replace(RUNS, running=4, waiting=4, batch_running=4, batch_waiting=4)
    assert step(own, unit("b", waiting=2, batch=2)) == Stay()
    done = replace(RUNS, running=1, batch_running=1)
    assert step(done, unit("b", waiting=4, batch=4)) == CloseGate("b", "queue served")


def test_next_fetch_units_of_people_come_first() -> None:
    units = [
        unit("b", tier=Residency.DISK, waiting=50, batch=50, oldest_s=500.0),
        unit("c", tier=Residency.DISK, waiting=1),
    ]
    assert next_fetch(RUNS, [A, *units], POLICY) == "c"
