"""The rule of roll-backs: its bounds, its error probability, and that nobody decides for others."""

from __future__ import annotations

import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.alias_rollback import (
    AliasOutcome,
    Rollback,
    SharedTraffic,
    Tally,
    excess_bound,
    find_fault,
    wilson,
)
from service.config.aliases import RollbackConfig

OK, ERROR, REFUSED, UNCOUNTED = AliasOutcome
RULE = RollbackConfig()
counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
levels = st.floats(0.5, 0.9999)


@given(count=counts, level=levels)
def test_wilson_holds_the_share_and_grows_with_confidence(
    count: tuple[int, int], level: float
) -> None:
    low, high = wilson(*count, level)
    assert 0 <= low <= count[0] / count[1] + 1e-12
    assert 1 >= high >= count[0] / count[1] - 1e-12
    lower, higher = wilson(*count, (1 + level) / 2)
    assert lower <= low + 1e-12
    assert higher >= high - 1e-12
    # By symmetry, as successes and failures change places.
    assert wilson(count[1] - count[0], count[1], level) == pytest.approx((1 - high, 1 - low))


def test_wilson_solves_its_equation() -> None:
    # The bounds are the shares at which the score test is just rejected.
    for at in wilson(7, 60, 0.975):
        z = (7 / 60 - at) / (at * (1 - at) / 60) ** 0.5
        assert abs(z) == pytest.approx(NormalDist().inv_cdf(0.975))


@given(target=counts, baseline=counts, level=levels)
def test_excess_bound_is_below_the_excess_and_grows_with_failures(
    target: tuple[int, int], baseline: tuple[int, int], level: float
) -> None:
    bound = excess_bound(*target, *baseline, level)
    assert bound <= target[0] / target[1] - baseline[0] / baseline[1] + 1e-12
    assert -1 - 1e-12 <= bound <= 1
    if target[0] < target[1]:
        assert excess_bound(target[0] + 1, target[1], *baseline, level) >= bound - 1e-12


@given(
    target=counts,
    baseline=counts,
    margin=st.floats(0, 0.5),
    least=st.integers(1, 300),
    level=st.floats(0.5, 0.999),
)
def test_fault_needs_enough_requests_and_a_greater_share(
    target: tuple[int, int],
    baseline: tuple[int, int],
    margin: float,
    least: int,
    level: float,
) -> None:
    rule = RollbackConfig(
        min_requests=least, error_margin=margin, refusal_margin=None, confidence=level
    )
    found = find_fault(Tally(target[1], target[0]), Tally(baseline[1], baseline[0]), rule)
    if found is not None:
        assert target[1] >= least
        assert found.share - found.baseline_share > margin
        assert (found.reason, found.requests) == ("errors", target[1])
    # What is off decides nothing.
    off = rule.model_copy(update={"enabled": False})
    assert find_fault(Tally(9999, 9999), Tally(9999), off) is None
    assert find_fault(Tally(9999, 9999), Tally(9999), RollbackConfig(error_margin=None)) is None
    assert (
        find_fault(Tally(9999, 0, 9999), Tally(9999), RollbackConfig(refusal_margin=None)) is None
    )


def run(
    seed: int, target: float, baseline: float, requests: int, rule: RollbackConfig, share: float
) -> int | None:
    """Simulate an alias; return after how many of the target's requests it is rolled back."""
    draw = random.Random(seed)
    traffic = SharedTraffic({"old": 1 - share, "new": share}, rule)
    asked = 0
    for _ in range(requests):
        name = "new" if draw.random() < share else "old"
        asked += name == "new"
        failed = draw.random() < (target if name == "new" else baseline)
        kind = ERROR if failed else OK
        if traffic.record(name, kind, "t", 0.0) is not None:
            return asked
    return None


def test_rollback_by_chance_is_as_rare_as_told() -> None:
    # Equally good targets and no margin: each of these looks might be the wrong one.
    rule = RollbackConfig(error_margin=0.0, refusal_margin=None, min_requests=20, confidence=0.9)
    wrong = sum(run(seed, 0.1, 0.1, 1500, rule, 0.3) is not None for seed in range(200))
    assert 0 < wrong / 200 <= 0.1
    # With the defaults' margin hardly ever.
    assert all(run(seed, 0.02, 0.02, 1500, RULE, 0.3) is None for seed in range(50))


def test_rollback_of_a_bad_target_is_quick() -> None:
    at = sorted(run(seed, 0.3, 0.01, 3000, RULE, 0.1) or 10**6 for seed in range(60))
    assert at[30] <= 60
    assert at[-1] <= 250
    assert at[0] >= RULE.min_requests


def fail(traffic: SharedTraffic, tenant: str, count: int, now_s: float = 0.0) -> Rollback | None:
    found = None
    for _ in range(count):
        found = found or traffic.record("new", ERROR, tenant, now_s)
    return found


def test_rollback_is_not_for_one_of_several_tenants_to_decide() -> None:
    traffic = SharedTraffic({"old": 9, "new": 1}, RULE)
    traffic.record("new", OK, "good", 0.0)
    assert fail(traffic, "bad", 500) is None
    # The other one meets a failure, too.
    found = traffic.record("new", ERROR, "good", 5.0)
    assert found is not None
    assert found.at_s == 5.0
    assert traffic.rolled_back == {"new": found}
    # One failure among many good answers is not enough, however often another one fails.
    busy = SharedTraffic({"old": 9, "new": 1}, RULE)
    for _ in range(200):
        busy.record("new", OK, "good", 0.0)
    assert busy.record("new", ERROR, "good", 0.0) is None
    assert fail(busy, "bad", 500) is None
    assert busy.rolled_back == {}
    for _ in range(20):
        found = busy.record("new", ERROR, "good", 0.0) or found
    assert busy.rolled_back == {"new": found}
    # With one tenant alone nobody else is concerned.
    alone = SharedTraffic({"old": 9, "new": 1}, RULE)
    assert fail(alone, "only", RULE.min_requests) is not None


def test_rollback_spares_the_baseline_and_what_does_not_count() -> None:
    traffic = SharedTraffic({"first": 5, "second": 5, "third": 1}, RULE)
    assert traffic.baseline == "first"
    for name in ("first", "unknown"):
        assert all(traffic.record(name, ERROR, "t", 0.0) is None for _ in range(200))
    assert all(traffic.record("third", UNCOUNTED, "t", 0.0) is None for _ in range(200))
    assert traffic.tally("third") == Tally()
    # When everything fails, no target is to blame.
    assert all(traffic.record("second", ERROR, "t", 0.0) is None for _ in range(200))
    assert traffic.rolled_back == {}


def test_rollback_forgets_what_is_longer_ago_than_its_window() -> None:
    traffic = SharedTraffic({"old": 9, "new": 1}, RollbackConfig(window_s=100))
    fail(traffic, "t", RULE.min_requests - 1, now_s=0.0)
    assert traffic.record("new", ERROR, "t", 101.0) is None
    assert traffic.tally("new") == Tally(1, 1)
    # A clock that was set back loses nothing.
    traffic.record("new", OK, "t", 20.0)
    assert traffic.tally("new") == Tally(2, 1)


def test_restore_counts_anew_and_tenants_are_bounded() -> None:
    traffic = SharedTraffic({"old": 9, "new": 1}, RULE)
    for number in range(1000):
        traffic.record("new", REFUSED, f"tenant-{number}", 0.0)
    assert traffic.rolled_back["new"].reason == "refusals"
    assert sum(len(one.tallies["new"]) for one in traffic._periods) <= 65
    assert traffic.tally("new").requests == 1000
    assert traffic.restore() == ["new"]
    assert (traffic.rolled_back, traffic.tally("new")) == ({}, Tally())
    assert traffic.restore() == []
