"""Choosing where a request goes."""

from __future__ import annotations

import pytest

from service.broker.choice import (
    PoolView,
    Wish,
    answer_s,
    displaced_s,
    failure_reason,
    home,
    options,
    unmet,
    wait_s,
)
from service.link.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import Residency

READY = ExpertState(Residency.DEVICE)
COLD = ExpertState(Residency.DISK, eta_s=20.0, swap_s=0.5)
TOKENS = 10


def view(
    boot: str,
    *,
    experts: dict[str, ExpertState] | None = None,
    queues: dict[str, Queue] | None = None,
    running: int = 0,
    waiting: int = 0,
    unseen: int = 0,
    age_s: float = 0.1,
    draining: bool = False,
    first_s: float = 0.1,
) -> PoolView:
    held = experts or {"a": READY}
    snapshot = Snapshot(
        boot=boot,
        kind="cpu",
        draining=draining,
        experts=held,
        queues=queues or {name: Queue(waiting, running) for name in held},
        capacity=dict.fromkeys(held, 4),
        speeds={name: Speed(first_s, 0.01) for name in held},
    )
    return PoolView(boot, snapshot, age_s, dict.fromkeys(held, unseen))


def wish(price: float = 0.01, **quality: float) -> Wish:
    return Wish(quality or {"a": 1.0}, price, TOKENS)


def chosen(*views: PoolView, wanted: Wish | None = None) -> list[tuple[str, str | None]]:
    found = options(wanted or wish(), frozenset({"far"}), views)
    return [(o.expert, o.boot) for o in found]


def test_the_shorter_wait_first_and_ties_are_stable() -> None:
    assert chosen(view("x", running=8), view("y")) == [("a", "y"), ("a", "x")]
    assert chosen(view("y"), view("x")) == [("a", "x"), ("a", "y")]


def test_requests_that_the_snapshot_cannot_count_yet_count() -> None:
    assert chosen(view("x", unseen=8), view("y", running=4))[0] == ("a", "y")


def test_wait_is_loading_plus_whole_batches_ahead_plus_a_share_of_ones_own() -> None:
    loading = {"a": ExpertState(Residency.LOADING, eta_s=30)}
    assert wait_s(view("x", experts=loading), "a", TOKENS) == 30
    each = answer_s(Speed(0.5, 0.01), TOKENS)
    assert each == pytest.approx(0.6)
    assert wait_s(view("x", running=4, waiting=4, first_s=0.5), "a", TOKENS) == 2 * each
    assert wait_s(view("x", running=2, first_s=0.5), "a", TOKENS) == pytest.approx(0.25)


def test_quality_goes_before_a_short_wait_and_not_before_a_long_one() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    for ahead, first in ((40, "a"), (4000, "b")):
        queues = {"a": Queue(ahead, 0), "b": Queue()}
        got = chosen(view("x", experts=both, queues=queues), wanted=wish(a=1.0, b=0.5))
        assert got[0] == (first, "x")


def test_traffic_moves_where_the_formula_says() -> None:
    both = {"a": READY, "b": ExpertState(Residency.DEVICE, slot=1)}
    price, gap, capacity = 0.05, 0.3, 4
    each = answer_s(Speed(0.1, 0.01), TOKENS)
    moves_at = gap / price / each * capacity
    for ahead in range(0, 400, capacity):
        queues = {"a": Queue(ahead, 0), "b": Queue()}
        wanted = wish(price, a=0.9, b=0.9 - gap)
        first = chosen(view("x", experts=both, queues=queues), wanted=wanted)[0][0]
        assert first == ("a" if ahead <= moves_at else "b")


def test_a_swap_costs_those_it_displaces_there_and_back() -> None:
    experts = {"a": READY, "b": ExpertState(Residency.HOST, eta_s=0.5, swap_s=0.5)}
    busy = view("x", experts=experts, queues={"a": Queue(3, 4), "b": Queue()})
    assert displaced_s(busy, "b") == 2 * 0.5 * 7
    assert displaced_s(busy, "a") == 0
    elsewhere = {"b": ExpertState(Residency.HOST, eta_s=0.5, swap_s=0.5, slot=1), "a": READY}
    assert displaced_s(view("y", experts=elsewhere, waiting=5), "b") == 0


def test_draining_and_failed_pools_are_no_options() -> None:
    failed = {"a": ExpertState(Residency.FAILED, reason="no weights")}
    assert chosen(view("x", draining=True), view("y", experts=failed)) == []


def test_a_stale_pool_comes_after_everything_else() -> None:
    assert chosen(view("x", age_s=1.5), view("y", running=90)) == [("a", "y"), ("a", "x")]
    got = chosen(view("x", age_s=1.5), wanted=wish(a=1.0, far=0.1))
    assert got == [("far", None), ("a", "x")]


def test_a_remote_expert_needs_no_pool() -> None:
    assert chosen(wanted=wish(far=1.0)) == [("far", None)]
    assert chosen(view("x"), wanted=wish(nobody=1.0)) == []


def test_unmet_demand_is_what_residency_would_have_won() -> None:
    pool = view("x", experts={"a": READY, "b": COLD})
    wanted = wish(0.05, a=0.5, b=0.9)
    best = options(wanted, frozenset(), [pool])[0]
    assert best.expert == "a"
    missed = unmet(wanted, best, [pool])
    assert missed is not None
    assert missed[0] == "b"
    assert missed[1] == pytest.approx(0.4, abs=0.01)
    patient = wish(0.001, a=0.5, b=0.9)
    assert unmet(patient, options(patient, frozenset(), [pool])[0], [pool]) is None


def test_every_gateway_tells_the_same_pool() -> None:
    cold = {"a": READY, "b": COLD}
    pools = [view(boot, experts=cold) for boot in ("x", "y", "z")]
    homes = {home("b", order) for order in (pools, pools[::-1], pools[1:] + pools[:1])}
    assert len(homes) == 1
    # Slightly different loads, as gateways see them, change nothing.
    noisy = [
        view(boot, experts=cold, queues={"a": Queue(running=6 + i), "b": Queue()})
        for i, boot in enumerate(("x", "y"))
    ]
    assert home("b", noisy) == home("b", [view(b, experts=cold, running=6) for b in ("x", "y")])


def test_demand_goes_where_the_weights_are_on_their_way() -> None:
    coming = {"a": READY, "b": ExpertState(Residency.LOADING, eta_s=5, swap_s=0.5)}
    cold = {"a": READY, "b": COLD}
    assert home("b", [view("x", experts=cold), view("y", experts=coming, running=90)]) == "y"
    assert home("b", [view("x")]) is None


def test_the_reason_only_when_every_pool_failed() -> None:
    failed = view("x", experts={"a": ExpertState(Residency.FAILED, reason="no weights")})
    assert failure_reason("a", [failed]) == "no weights"
    assert failure_reason("a", [failed, view("y")]) is None
    assert failure_reason("b", [failed]) is None
    assert failure_reason("a", []) is None
