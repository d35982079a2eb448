"""The error replies of pools, as the gateway takes them."""

from __future__ import annotations

import orjson
import pytest

from service import errors
from service.gateway.dispatch.pool_errors import RETRIED, error_from_fault
from service.gateway.dispatch.retry_decisions import AfterFault, after_fault, is_loss
from service.http.error_formats import detail_of

# What a pool raises without having an answer: does it count as a death of the pool or engine?
RAISED = {
    errors.PoolDrainingError: False,
    errors.PoolReplacedError: False,
    errors.OverCapacityError: False,
    errors.ExpertFailedError: False,
    errors.EngineRestartingError: False,
    errors.EngineDeadError: True,
}


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: str(kind.__name__))
def test_error_from_fault_is_retried_and_a_loss_only_if_something_died(
    kind: type[errors.UnavailableError],
) -> None:
    raised = kind("it can't answer")
    assert raised.code in RETRIED
    body = orjson.dumps({"error": detail_of(raised)})
    found = error_from_fault(raised.code, body, "7")
    assert (found.message, found.retry_after_s) == ("it can't answer", 7)
    assert is_loss(found) is RAISED[kind]
    assert after_fault(found, 0) in (AfterFault.RETRY, AfterFault.RETRY_WITHIN_BUDGET)
