"""Choosing where a request goes."""

from __future__ import annotations

from service.broker.choice import PoolView, failure_reason, options, predicted_wait_s
from service.link.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import Residency

READY = ExpertState(Residency.DEVICE)


def view(
    boot: str,
    *,
    experts: dict[str, ExpertState] | None = None,
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
        queues={name: Queue(waiting, running) for name in held},
        capacity=dict.fromkeys(held, 4),
        speeds={name: Speed(first_s, 0.01) for name in held},
    )
    return PoolView(boot, snapshot, age_s, dict.fromkeys(held, unseen))


def chosen(*views: PoolView, preference: tuple[str, ...] = ("a",)) -> list[tuple[str, str | None]]:
    return [(o.expert, o.boot) for o in options(preference, frozenset({"far"}), views)]


def test_the_shorter_wait_first_and_ties_are_stable() -> None:
    assert chosen(view("x", running=8), view("y")) == [("a", "y"), ("a", "x")]
    assert chosen(view("y"), view("x")) == [("a", "x"), ("a", "y")]


def test_requests_that_the_snapshot_cannot_count_yet_count() -> None:
    assert chosen(view("x", unseen=8), view("y", running=4))[0] == ("a", "y")


def test_wait_is_loading_plus_queue_plus_prefill() -> None:
    loading = {"a": ExpertState(Residency.LOADING, eta_s=30)}
    assert predicted_wait_s(view("x", experts=loading, first_s=0.1), "a") == 30.1
    assert predicted_wait_s(view("x", running=4, waiting=4, first_s=0.5), "a") == 0.5 * 3
    assert chosen(view("x", experts=loading), view("y", waiting=40)) == [("a", "y"), ("a", "x")]


def test_preference_goes_before_waiting() -> None:
    both = {"a": READY, "b": READY}
    assert chosen(view("x", experts=both, running=9), preference=("a", "b")) == [
        ("a", "x"),
        ("b", "x"),
    ]


def test_draining_and_failed_pools_are_no_options() -> None:
    failed = {"a": ExpertState(Residency.FAILED, reason="no weights")}
    assert chosen(view("x", draining=True), view("y", experts=failed)) == []


def test_a_stale_pool_comes_after_everything_else() -> None:
    assert chosen(view("x", age_s=1.5), view("y", running=90)) == [("a", "y"), ("a", "x")]
    assert chosen(view("x", age_s=1.5), preference=("a", "far")) == [("far", None), ("a", "x")]


def test_a_remote_expert_needs_no_pool() -> None:
    assert chosen(preference=("far",)) == [("far", None)]
    assert chosen(view("x"), preference=("nobody",)) == []


def test_the_reason_only_when_every_pool_failed() -> None:
    failed = view("x", experts={"a": ExpertState(Residency.FAILED, reason="no weights")})
    assert failure_reason("a", [failed]) == "no weights"
    assert failure_reason("a", [failed, view("y")]) is None
    assert failure_reason("b", [failed]) is None
    assert failure_reason("a", []) is None
