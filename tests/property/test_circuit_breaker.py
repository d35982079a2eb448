"""Circuit breakers under any order of events let a probe through in time."""

from __future__ import annotations

import random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.broker.circuit_breaker import (
    Breaker,
    BreakerPolicy,
    Breakers,
    Permit,
    RetryBudget,
    State,
    backoff_s,
)

POLICY = BreakerPolicy(failures=3, open_duration_s=2, max_open_duration_s=10, together_s=0.25)


def fail(breaker: Breaker, now_s: float) -> bool:
    return breaker.end(breaker.begin(now_s), False, now_s)


def test_breaker_opens_after_consecutive_failures_and_closes_after_a_probe() -> None:
    breaker = Breaker(POLICY, lambda: 0.0)
    assert [fail(breaker, now_s) for now_s in (0.0, 1.0)] == [False, False]
    breaker.end(breaker.begin(1.5), True, 1.5)  # a success: from the start again
    assert [fail(breaker, now_s) for now_s in (2.0, 3.0, 4.0)] == [False, False, True]
    assert not breaker.allows(5.9)
    assert breaker.left_s(5) == 1
    assert breaker.state(6) is State.HALF_OPEN
    probe = breaker.begin(6)
    assert probe.probe
    assert not breaker.allows(6)  # one at a time
    assert breaker.end(probe, False, 6.5)
    assert breaker.state(10.4) is State.OPEN  # twice as long
    assert breaker.state(10.5) is State.HALF_OPEN
    breaker.end(breaker.begin(11), True, 11)
    assert breaker.state(11) is State.CLOSED


def test_breaker_concurrent_failures_of_one_cause_count_once() -> None:
    breaker = Breaker(POLICY, lambda: 0.0)
    tries = [breaker.begin(0) for _ in range(64)]
    assert not any([breaker.end(item, False, 1.0) for item in tries])
    assert breaker.allows(1)


def test_breaker_neutral_outcome_changes_nothing_and_frees_the_probe() -> None:
    breaker = Breaker(POLICY, lambda: 0.0)
    for now_s in (0.0, 1.0, 2.0):
        breaker.end(breaker.begin(now_s), None, now_s)
    assert breaker.allows(2)
    for now_s in (3.0, 4.0, 5.0):
        fail(breaker, now_s)
    probe = breaker.begin(8)
    breaker.end(probe, None, 8)
    assert breaker.allows(8)


def test_breaker_failure_of_a_call_from_before_it_opened_is_ignored() -> None:
    breaker = Breaker(POLICY, lambda: 0.0)
    late = breaker.begin(0)
    for now_s in (1.0, 2.0, 3.0):
        fail(breaker, now_s)
    breaker.end(breaker.begin(5), True, 5)
    assert breaker.state(5) is State.CLOSED
    assert not breaker.end(late, False, 6)
    assert breaker.end(late, True, 6) is False


def test_breakers_are_created_by_failures_only() -> None:
    breakers: Breakers[str] = Breakers(POLICY, lambda: 0.0)
    breakers.end("a", breakers.begin("a", 0), True, 0)
    assert breakers.states(0) == {}
    for now_s in (1.0, 2.0, 3.0):
        breakers.end("a", breakers.begin("a", now_s), False, now_s)
    assert breakers.blocked(3) == {"a"}
    assert breakers.left_s(["a", "b"], 3) == 2
    breakers.forget(lambda key: key == "a")
    assert breakers.blocked(3) == frozenset()


def test_retry_budget_limits_retries() -> None:
    budget = RetryBudget(0.2, 10)
    assert sum(budget.spend() for _ in range(100)) == 10
    spent = 0
    for _ in range(1000):
        budget.earn()
        spent += budget.spend()
    assert 199 <= spent <= 200


def test_backoff_grows_and_is_bounded() -> None:
    assert backoff_s(0, lambda: 1.0) == 0.05
    assert backoff_s(3, lambda: 1.0) == 0.4
    assert backoff_s(1000, lambda: 1.0) == 1.0
    assert backoff_s(5, lambda: 0.0) == 0.0


class Machine(RuleBasedStateMachine):
    """Any order of beginnings and ends, also late and twice open."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.breaker = Breaker(POLICY, random.Random(0).random)
        self.under_way: list[Permit] = []

    @rule(for_s=st.sampled_from([0.0, 0.1, 0.3, 1.0, 5.0, 20.0]))
    def wait(self, for_s: float) -> None:
        self.now_s += for_s

    @precondition(lambda self: self.breaker.allows(self.now_s))
    @rule()
    def begin(self) -> None:
        self.under_way.append(self.breaker.begin(self.now_s))

    @precondition(lambda self: self.under_way)
    @rule(at=st.integers(0, 100), ok=st.sampled_from([True, False, None]))
    def end(self, at: int, ok: bool | None) -> None:
        one = self.under_way.pop(at % len(self.under_way))
        opened = self.breaker.end(one, ok, self.now_s)
        assert not (opened and ok is not False)
        assert not opened or not self.breaker.allows(self.now_s)

    @invariant()
    def it_is_never_shut_for_good(self) -> None:
        probing = any(item.probe for item in self.under_way)
        later_s = self.now_s + POLICY.max_open_duration_s * 1.2
        assert probing or self.breaker.allows(later_s)
        assert self.breaker.left_s(self.now_s) <= POLICY.max_open_duration_s * 1.2


TestAnyOrder = Machine.TestCase
