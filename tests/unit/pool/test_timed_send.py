"""The tokens that a pool counts as an answer passes."""

from __future__ import annotations

import orjson
import pytest

from service.engine.engine_interface import Message
from service.pool.timed_send import TimedSend
from service.rpc.expert_latency import ResponseTimer


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
