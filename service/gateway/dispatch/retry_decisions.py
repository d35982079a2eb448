"""Decides whether to retry a failed call, and which error a request gets otherwise.

The functions are pure. They take the state of attempts and pools, and return a decision. Four words
have one meaning each here and in the dispatcher:

- An *error* is any `CoeError`, such as that of a refused body. Most go to the client at once.
- A *fault* is the error of an attempt in one pool or at one endpoint, before anything was sent. The
  request may go elsewhere, and the last fault is what the client gets if nothing else is left.
- A *loss* is a fault by which an engine or a pool died while it had the request.
- *Failed* is an attempt that ended with a fault, or an expert that could not be loaded.
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
    PoolReplacedError,
    PoolStoppedError,
    PoolUnavailableError,
    PoolUnreachableError,
)

# After two engines or pools have died with a request, no third gets it.
MOST_LOSSES = 2
# A pool replaces an engine that died, so it may get the request a second time.
TRIES_PER_POOL = 2
_MOST_ATTEMPTS = 2 * TRIES_PER_POOL
# After these errors no engine has worked on the request, so a retry is free.
_FREE = (PoolDrainingError, PoolReplacedError, OverCapacityError, ExpertFailedError)

# After these errors, a pool will be there that was not tried.
_PASSING = (PoolUnavailableError, PoolReplacedError, EngineDeadError)


class AfterFault(StrEnum):
    """The decision after a failed attempt that has sent nothing to the client."""

    RETRY = "retry"
    RETRY_WITHIN_BUDGET = "retry_within_budget"
    RAISE = "raise"
    DIED_TWICE = "died_twice"


class WithoutOption(StrEnum):
    """The decision if no pool or endpoint is left."""

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
    """Decide after a failed attempt.

    Args:
        fault: The attempt's error.
        losses: Number of engines and pools that died while they had the request, including the
            last attempt's.
    """
    if losses >= MOST_LOSSES:
        return AfterFault.DIED_TWICE
    if isinstance(fault, DeadlineExceededError):
        return AfterFault.RAISE
    return AfterFault.RETRY if isinstance(fault, _FREE) else AfterFault.RETRY_WITHIN_BUDGET


def tries_per_pool(fault: CoeError | None) -> int:
    """The number of times that a request may try the same pool, after this fault."""
    return TRIES_PER_POOL if isinstance(fault, (EngineDeadError, PoolUnavailableError)) else 1


def without_option(
    fault: CoeError | None, *, attempts: int, resting: bool, usable: bool, failed: bool
) -> WithoutOption:
    """Decide if no pool or endpoint is left.

    Args:
        fault: The error of the last attempt; None before the first.
        attempts: Number of attempts so far.
        resting: Whether there is a pool that could answer, but whose circuit breaker is open.
        usable: Whether there is a pool that could answer, but that has no tries left.
        failed: Whether the expert could not be loaded in any pool.
    """
    if resting:
        return WithoutOption.REFUSE_AS_RESTING if fault is None else WithoutOption.RAISE_FAULT
    if fault is not None:
        if not isinstance(fault, _PASSING):
            return WithoutOption.RAISE_FAULT
        if isinstance(fault, EngineDeadError) and usable:
            return WithoutOption.RAISE_FAULT
        if attempts >= _MOST_ATTEMPTS:
            return WithoutOption.RAISE_FAULT
    return WithoutOption.REFUSE_AS_FAILED if failed else WithoutOption.WAIT
