"""Loading, replacing and removing LoRA adapters in vLLM while others answer."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
import pytest_asyncio

from service.engine.base import EngineRequest, Message
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.errors import ExpertFailedError
from tests.support.engine.real import ADAPTERS, BASE, ON_ONE_ENGINE, OPTIONS

pytestmark = ON_ONE_ENGINE

# Long enough to be cached in whole blocks, which an adapter must not inherit from another.
PROMPT = "def newest(folder):\n    files = sorted(folder.iterdir())\n" * 6 + "What is 12 times 3?"
_ids = itertools.count()


async def answer(engine: VllmEngine, expert: str, tokens: int = 16) -> str:
    """What an expert goes on with, taking the likeliest token each time."""
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        parts.append(message.get("body", b""))

    body = {"model": expert, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    request = EngineRequest(
        "/v1/completions", expert, orjson.dumps({**body, "ignore_eos": True}), f"r{next(_ids)}"
    )
    await engine.run(request, collect)
    told = orjson.loads(b"".join(parts))
    assert "choices" in told, told
    return str(told["choices"][0]["text"])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engine() -> AsyncIterator[VllmEngine]:
    model = VllmModel("base", BASE, {"math": str(ADAPTERS / "math")})
    made = VllmEngine(model, OPTIONS, on_cpu=True)
    await made.start()
    await made.load("math")
    yield made
    await made.stop()


async def test_load_one_more_adapter_keeps_running_requests(engine: VllmEngine) -> None:
    before = await answer(engine, "math")
    under_way = asyncio.create_task(answer(engine, "math", 150))
    await asyncio.sleep(0.2)
    await engine.load("code", str(ADAPTERS / "code"))
    assert not under_way.done()
    # More adapters than the engine was started with take turns.
    again, other = await asyncio.gather(*(answer(engine, name) for name in ("math", "code")))
    assert again == before != other
    assert (await under_way).startswith(before)


async def test_load_replaced_adapter_answers_as_the_new_one(
    engine: VllmEngine, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "math", folder)
    await engine.load("changing", str(folder))
    assert await answer(engine, "changing") == await answer(engine, "math")
    await engine.unload("changing")
    with pytest.raises(AssertionError, match="does not exist"):
        await answer(engine, "changing")
    shutil.rmtree(folder)
    shutil.copytree(ADAPTERS / "code", folder)
    await engine.load("changing", str(folder))
    await engine.load("other", str(ADAPTERS / "code"))
    assert await answer(engine, "changing") == await answer(engine, "other")
    assert await answer(engine, "changing") != await answer(engine, "math")


async def test_load_folder_without_an_adapter_raises_and_keeps_the_others(
    engine: VllmEngine, tmp_path: Path
) -> None:
    before = await answer(engine, "math")
    with pytest.raises(ExpertFailedError):
        await engine.load("nothing", str(tmp_path))
    assert await answer(engine, "math") == before
