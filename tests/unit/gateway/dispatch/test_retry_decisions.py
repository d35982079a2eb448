"""The decision whether a failed call is made again, as a table over every error."""

from __future__ import annotations

import itertools

import pytest

from service import errors
from service.errors import CoeError, UnavailableError, UpstreamError
from service.gateway.dispatch.retry_decisions import (
    MOST_LOSSES,
    AfterFault,
    WithoutOption,
    after_fault,
    is_loss,
    tries_per_pool,
    without_option,
)

# Of every error that an attempt can end with: is it a loss, what follows, tries of one pool.
TABLE: dict[type[CoeError], tuple[bool, AfterFault, int]] = {
    errors.PoolDrainingError: (False, AfterFault.RETRY, 1),
    errors.PoolReplacedError: (False, AfterFault.RETRY, 1),
    errors.OverCapacityError: (False, AfterFault.RETRY, 1),
    errors.ExpertFailedError: (False, AfterFault.RETRY, 1),
    errors.EngineRestartingError: (False, AfterFault.RETRY_WITHIN_BUDGET, 2),
    errors.EngineDeadError: (True, AfterFault.RETRY_WITHIN_BUDGET, 2),
    errors.PoolUnreachableError: (False, AfterFault.RETRY_WITHIN_BUDGET, 2),
    errors.PoolStoppedError: (False, AfterFault.RETRY_WITHIN_BUDGET, 2),
    errors.PoolUnavailableError: (True, AfterFault.RETRY_WITHIN_BUDGET, 2),
    errors.UpstreamError: (False, AfterFault.RETRY_WITHIN_BUDGET, 1),
    errors.DeadlineExceededError: (False, AfterFault.RAISE, 1),
    errors.EngineTimeoutError: (False, AfterFault.RAISE, 1),
    errors.CircuitOpenError: (False, AfterFault.RETRY_WITHIN_BUDGET, 1),
    errors.StoreUnavailableError: (False, AfterFault.RETRY_WITHIN_BUDGET, 1),
    errors.UnavailableError: (False, AfterFault.RETRY_WITHIN_BUDGET, 1),
}


def _kinds(base: type[CoeError]) -> set[type[CoeError]]:
    return {base}.union(
        *(_kinds(kind) for kind in base.__subclasses__() if kind.__module__ == errors.__name__)
    )


def test_retry_table_covers_every_dispatch_error() -> None:
    assert TABLE.keys() == _kinds(UnavailableError) | _kinds(UpstreamError)


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: str(kind.__name__))
@pytest.mark.parametrize("losses", range(4))
def test_after_fault_follows_the_table_and_stops_after_two_losses(
    kind: type[CoeError], losses: int
) -> None:
    loss, follows, tries = TABLE[kind]
    fault = kind("it failed")
    assert is_loss(fault) is loss
    assert tries_per_pool(fault) == tries
    expected = AfterFault.DIED_TWICE if losses >= MOST_LOSSES else follows
    assert after_fault(fault, losses) is expected


@pytest.mark.parametrize(
    ("fault", "attempts", "resting", "usable", "failed", "expected"),
    [
        (None, 0, False, False, False, WithoutOption.WAIT),
        (None, 0, False, False, True, WithoutOption.REFUSE_AS_FAILED),
        (None, 0, True, True, False, WithoutOption.REFUSE_AS_RESTING),
        (errors.OverCapacityError, 1, False, True, False, WithoutOption.RAISE_FAULT),
        (errors.OverCapacityError, 1, True, True, False, WithoutOption.RAISE_FAULT),
        (errors.UpstreamError, 1, False, False, False, WithoutOption.RAISE_FAULT),
        (errors.PoolReplacedError, 1, False, False, False, WithoutOption.WAIT),
        (errors.PoolReplacedError, 4, False, False, False, WithoutOption.RAISE_FAULT),
        # The engine that comes next is waited for; one that is there was asked already.
        (errors.EngineDeadError, 1, False, False, False, WithoutOption.WAIT),
        (errors.EngineDeadError, 1, False, True, False, WithoutOption.RAISE_FAULT),
        (errors.EngineRestartingError, 3, False, False, False, WithoutOption.WAIT),
        (errors.EngineRestartingError, 4, False, False, False, WithoutOption.RAISE_FAULT),
        (errors.PoolUnavailableError, 1, False, True, False, WithoutOption.WAIT),
        (errors.PoolUnreachableError, 4, False, False, False, WithoutOption.RAISE_FAULT),
        (errors.PoolUnavailableError, 1, False, False, True, WithoutOption.REFUSE_AS_FAILED),
    ],
)
def test_without_option_returns_the_action_of_the_table(
    fault: type[CoeError] | None,
    attempts: int,
    resting: bool,
    usable: bool,
    failed: bool,
    expected: WithoutOption,
) -> None:
    given = None if fault is None else fault("it failed")
    found = without_option(given, attempts=attempts, resting=resting, usable=usable, failed=failed)
    assert found is expected


def test_after_fault_no_sequence_dispatches_again_after_two_losses() -> None:
    for sequence in itertools.product(TABLE, repeat=4):
        losses = 0
        asked_after_two = False
        for kind in sequence:
            asked_after_two |= losses >= MOST_LOSSES
            fault = kind("it failed")
            losses += is_loss(fault)
            follows = after_fault(fault, losses)
            if follows in (AfterFault.RAISE, AfterFault.DIED_TWICE):
                break
        assert not asked_after_two
