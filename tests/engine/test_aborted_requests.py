"""Token counts of aborted requests in vLLM."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import pytest_asyncio

from service.engine.engine_interface import EngineRequest, Message
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.telemetry.pool_metrics import PoolMetrics
from tests.support.engine.real_engines import BASE, ON_ONE_ENGINE, OPTIONS, metric_values
from tests.support.polling import until

pytestmark = ON_ONE_ENGINE

SAID: Any = [{"role": "user", "content": "Write a very long story about a dragon."}]
LONG = {"ignore_eos": True}
BODIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat": ("/v1/chat/completions", {"messages": SAID, "max_tokens": 440, **LONG}, 1),
    "choices": ("/v1/chat/completions", {"messages": SAID, "max_tokens": 440, "n": 3, **LONG}, 3),
    "text": ("/v1/completions", {"prompt": ["One,", "Two,"], "max_tokens": 440, **LONG}, 2),
    "response": ("/v1/responses", {"input": SAID, "max_output_tokens": 440, **LONG}, 1),
    # That API has no `ignore_eos`: the model's greedy answer to this prompt is long by itself.
    "message": ("/v1/messages", {"messages": SAID, "max_tokens": 440, "temperature": 0}, 1),
}
_ids = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[tuple[VllmEngine, PoolMetrics]]:
    metrics = PoolMetrics()
    made = VllmEngine(VllmModel("base", BASE, {}), OPTIONS, on_cpu=True, observer=metrics)
    await made.start()
    yield made, metrics
    await made.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", BODIES)
async def test_aborted_request_reports_the_tokens_counted_by_the_engine(
    engine: tuple[VllmEngine, PoolMetrics], what: str, stream: bool
) -> None:
    made, metrics = engine
    path, body, sequences = BODIES[what]

    async def count() -> float:
        return (await metric_values(metrics)).get(("vllm:generation_tokens_total", "base"), 0.0)

    before = await count()
    given: list[tuple[int, int]] = []
    raw = orjson.dumps({"model": "base", "stream": stream, **body})
    request = EngineRequest(
        path,
        "base",
        raw,
        f"left{next(_ids)}",
        on_abandoned=lambda prompt, answer: given.append((prompt, answer)),
    )

    async def ignore(message: Message) -> None:
        assert b'"error"' not in message.get("body", b""), message

    running = asyncio.create_task(made.run(request, ignore))

    async def some() -> bool:
        assert not running.done(), running.exception()
        return await count() - before >= 20 * sequences

    await until(some, "it has made some tokens")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    async def stopped() -> bool:
        return await made.in_flight() == 0

    await until(stopped, "nobody works on it any more")
    ((prompt, answer),) = given
    assert prompt >= 2 * (2 if what == "text" else 3)
    # What is made in the moment of stopping is nobody's.
    assert 20 * sequences <= answer <= await count() - before <= answer + 20 * sequences
