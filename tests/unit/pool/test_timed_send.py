"""The tokens that a pool counts as an answer passes."""

from __future__ import annotations

import orjson
import pytest

from service.engine.engine_interface import Message
from service.pool.timed_send import TimedSend
from service.rpc.expert_latency import ExpertLatency, ResponseTimer


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


@pytest.mark.parametrize(("wait_s", "chunk_s"), [(0.0, 0.02), (0.0005, 0.0205), (3.0, 0.0)])
async def test_timed_send_learns_no_speed_of_a_stream_that_its_reader_holds_up(
    wait_s: float, chunk_s: float
) -> None:
    now_s = 100.0

    async def read_slowly(_: Message) -> None:
        nonlocal now_s
        now_s += wait_s

    measured = TimedSend(read_slowly, None)
    measured._clock = lambda: now_s
    measured._timer = timer = ResponseTimer(now_s)
    now_s += 0.3
    head = [(b"content-type", b"text/event-stream")]
    await measured({"type": "http.response.start", "status": 200, "headers": head})
    for i in range(102):
        now_s += 0.02 * (i < 100)
        more = {"type": "http.response.body", "body": b"data: {}", "more_body": i < 101}
        await measured(more)
    learnt = ExpertLatency()
    timer.report(learnt.usual, 10)
    speed = learnt.usual.speed(now_s)
    assert speed.first_s == pytest.approx(0.3)
    assert speed.chunk_s == pytest.approx(chunk_s, rel=0.05)
