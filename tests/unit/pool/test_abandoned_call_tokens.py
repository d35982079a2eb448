"""The tokens of abandoned calls."""

from __future__ import annotations

from contextlib import ExitStack

from service.pool.abandoned_call_tokens import AbandonedCalls


async def test_abandoned_calls_of_one_id_end_apart() -> None:
    calls = AbandonedCalls()
    with ExitStack() as later:
        with calls.call("a"):
            later.enter_context(calls.call("a"))
        calls.mark_running("a")
        calls.record("a", 3, 2)
    assert await calls.used("a") == (3, 2)
