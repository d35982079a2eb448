"""vLLM's prefix cache hits within a tenant and never across tenants."""

from __future__ import annotations

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


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


TEXT = "The harbour master writes down every ship that comes in, its flag and its cargo. " * 18
# Each endpoint has a text of its own: most of them make the same prompt of the same words.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": f"1. {TEXT}", "max_tokens": 1},
    "/v1/chat/completions": {"messages": _said(f"2. {TEXT}"), "max_tokens": 1},
    "/v1/responses": {"input": f"3. {TEXT}", "max_output_tokens": 1},
    "/v1/messages": {"messages": _said(f"4. {TEXT}"), "max_tokens": 1},
}
_ids = itertools.count()


class Asked:
    """An engine, and what it finds in its prefix cache."""

    def __init__(self, engine: VllmEngine, metrics: PoolMetrics) -> None:
        self.engine = engine
        self.metrics = metrics
        self.queries = 0.0

    async def hits(self, path: str, body: dict[str, Any], salt: str) -> float:
        """How many tokens of a request's prompt were cached."""
        before = await self._count("vllm:prefix_cache_hits_total")
        queried = await self._count("vllm:prefix_cache_queries_total")
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))

        raw = orjson.dumps({"model": "base", **body})
        await self.engine.run(
            EngineRequest(path, "base", raw, f"t{next(_ids)}", cache_salt=salt), collect
        )
        assert b'"error"' not in b"".join(parts), parts

        async def counted() -> bool:
            return await self._count("vllm:prefix_cache_queries_total") > queried

        await until(counted, "the engine has told its counts")
        return await self._count("vllm:prefix_cache_hits_total") - before

    async def _count(self, name: str) -> float:
        return (await metric_values(self.metrics)).get((name, "base"), 0.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def asked() -> AsyncIterator[Asked]:
    metrics = PoolMetrics()
    engine = VllmEngine(VllmModel("base", BASE, {}), OPTIONS, on_cpu=True, observer=metrics)
    await engine.start()
    yield Asked(engine, metrics)
    await engine.stop()


@pytest.mark.parametrize("path", BODIES)
async def test_prefix_cache_hits_within_a_tenant_and_never_across(asked: Asked, path: str) -> None:
    body, who = BODIES[path], path.replace("/", "-")
    assert await asked.hits(path, body, f"{who}-a") == 0
    assert await asked.hits(path, body, f"{who}-a") > 0
    assert await asked.hits(path, body, f"{who}-b") == 0
    assert await asked.hits(path, body, "") == 0
    # Not by a salt of its own either, whatever it is.
    if path != "/v1/messages":
        assert await asked.hits(path, {**body, "cache_salt": f"{who}-a"}, f"{who}-c") == 0


async def test_engine_runs_with_arguments_of_vllm(asked: Asked) -> None:
    model = asked.engine.vllm.rendering.config.model_config
    assert model.max_logprobs == OPTIONS.args["max_logprobs"] == 21


async def test_stored_turn_is_a_prompt_whose_tokens_are_counted_and_cached(asked: Asked) -> None:
    """The items of a turn go back to the engine as they came, as the gateway sends them."""
    path, replies, statuses = "/v1/responses", [], [0]

    async def ask(endpoint: str, **body: Any) -> Any:
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))
            statuses.append(message.get("status", statuses[-1]))

        raw = orjson.dumps({"model": "base", "store": False, **body})
        request = EngineRequest(endpoint, "base", raw, f"t{next(_ids)}", cache_salt="stored")
        await asked.engine.run(request, collect)
        return orjson.loads(b"".join(parts))

    items: list[dict[str, Any]] = []
    for text in (f"5. {TEXT}", "And then?", "And after that?"):
        items += _said(text)
        counted = await ask(f"{path}/input_tokens", input=items)
        assert counted["object"] == "response.input_tokens"
        # vLLM counts what is in its prefix cache by whole blocks.
        replies.append(await ask(path, input=items, max_output_tokens=4, temperature=0))
        assert replies[-1]["usage"]["input_tokens"] == counted["input_tokens"]
        items += replies[-1]["output"]
    cached = [reply["usage"]["input_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached[0] == 0
    assert 0 < cached[1] <= cached[2]
    assert statuses[-1] == 200
    refused = await ask(f"{path}/input_tokens", input=[{"type": "no such item"}])
    assert (statuses[-1], refused.keys()) == (400, {"error"})
