"""Whether a call that failed is made again, and what a request is told if it is not.

Pure: what is known of the attempts and of the pools goes in, a decision comes out.
"""

from __future__ import annotations

from enum import StrEnum

from service.errors import (
    CoeError,
    DeadlineExceededError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    OverCapacityError,
    PoolDrainingError,
    PoolStoppedError,
    PoolUnavailableError,
    PoolUnreachableError,
)

# A request that two engines or pools did not survive is given to no third.
MOST_LOSSES = 2
# An engine that died is being replaced, so its pool may be asked a second time.
TRIES_PER_POOL = 2
_MOST_ATTEMPTS = 2 * TRIES_PER_POOL
# Nobody had worked on it: another attempt costs no more than the first would have.
_FREE = (PoolDrainingError, OverCapacityError, ExpertFailedError)


class AfterFault(StrEnum):
    """What follows a failed attempt of which nothing has been sent to the client."""

    RETRY = "retry"
    RETRY_IF_PAID = "retry_if_paid"
    RAISE = "raise"
    DIED_TWICE = "died_twice"


class WithoutOption(StrEnum):
    """What follows when no pool or endpoint is left to ask."""

    WAIT = "wait"
    RAISE_FAULT = "raise_fault"
    REFUSE_AS_RESTING = "refuse_as_resting"
    REFUSE_AS_FAILED = "refuse_as_failed"


def is_loss(fault: CoeError) -> bool:
    """Whether an engine or a pool died while it had the request."""
    if isinstance(fault, (PoolUnreachableError, PoolStoppedError, EngineRestartingError)):
        return False
    return isinstance(fault, (PoolUnavailableError, EngineDeadError))


def after_fault(fault: CoeError, losses: int) -> AfterFault:
    """What follows a failed attempt.

    Args:
        fault: What became of the attempt.
        losses: Engines and pools that died while they had the request, this one included.
    """
    if losses >= MOST_LOSSES:
        return AfterFault.DIED_TWICE
    if isinstance(fault, DeadlineExceededError):
        return AfterFault.RAISE
    return AfterFault.RETRY if isinstance(fault, _FREE) else AfterFault.RETRY_IF_PAID


def tries_per_pool(fault: CoeError | None) -> int:
    """How often one pool may be asked by one request, after this fault."""
    return TRIES_PER_POOL if isinstance(fault, (EngineDeadError, PoolUnavailableError)) else 1


def without_option(
    fault: CoeError | None, *, attempts: int, resting: bool, usable: bool, failed: bool
) -> WithoutOption:
    """What follows when no pool or endpoint is left to ask.

    Args:
        fault: What became of the last attempt; None before the first.
        attempts: Attempts made so far.
        resting: A pool that could answer is left alone by an open circuit breaker.
        usable: A pool is there and could answer, but it was asked often enough.
        failed: The expert could not be loaded anywhere.
    """
    if resting:
        return WithoutOption.REFUSE_AS_RESTING if fault is None else WithoutOption.RAISE_FAULT
    if fault is not None:
        if not isinstance(fault, (PoolUnavailableError, EngineDeadError)):
            return WithoutOption.RAISE_FAULT
        if isinstance(fault, EngineDeadError) and usable:
            return WithoutOption.RAISE_FAULT
        if attempts >= _MOST_ATTEMPTS:
            return WithoutOption.RAISE_FAULT
    return WithoutOption.REFUSE_AS_FAILED if failed else WithoutOption.WAIT
