"""Sequence numbers, times and tokens of a pool's calls."""

from __future__ import annotations

from contextlib import ExitStack

import orjson
import pytest

from service.engine.engine_interface import Message
from service.pool.call_records import AbandonedCalls, Acknowledgements, TimedSend
from service.rpc.expert_latency import ResponseTimer


def test_acknowledge_out_of_order_calls_keeps_the_highest_sequence() -> None:
    acks = Acknowledgements()
    for seq in (1, 3, 2):
        acks.record("a", seq)
    assert acks.to_wire() == {"a": 3}


def test_acknowledge_drops_gateways_not_heard_of_for_long() -> None:
    acks = Acknowledgements()
    for seq in range(1, 1000):
        acks.record("always", seq)
        acks.record(f"gateway-{seq}", seq)
    wire = acks.to_wire()
    assert len(wire) <= 256
    assert wire["always"] == wire["gateway-999"] == 999


async def nobody(message: Message) -> None:
    del message


@pytest.mark.parametrize(
    ("reply", "tokens"),
    [
        ({"usage": {"prompt_tokens": 1, "completion_tokens": 7}}, 7),
        ({"usage": {"input_tokens": 1, "output_tokens": 7}}, 7),
        # The user's own words for it, in a tool that the reply tells again.
        (
            {
                "tools": [{"parameters": {"output_tokens": 0, "usage": {"output_tokens": 0}}}],
                "usage": {"input_tokens": 1, "output_tokens": 7},
            },
            7,
        ),
    ],
)
async def test_timed_send_of_a_whole_reply_counts_tokens_by_its_usage(
    reply: object, tokens: int
) -> None:
    counted: list[int] = []
    measured = TimedSend(nobody, None)
    measured._record_tokens = counted.append
    measured._timer = ResponseTimer(0.0)
    await measured({"type": "http.response.start", "status": 200, "headers": []})
    await measured({"type": "http.response.body", "body": orjson.dumps(reply)})
    assert counted == [tokens]


async def test_abandoned_calls_of_one_id_end_apart() -> None:
    calls = AbandonedCalls()
    with ExitStack() as later:
        with calls.call("a"):
            later.enter_context(calls.call("a"))
        calls.mark_running("a")
        calls.record("a", 3, 2)
    assert await calls.used("a") == (3, 2)
