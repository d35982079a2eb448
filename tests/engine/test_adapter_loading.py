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

from service.engine.engine_interface import EngineReport, EngineRequest, Message, Send
from service.engine.vllm.engine import GENERATE_ENDPOINTS, VllmEngine, VllmModel
from service.errors import ExpertFailedError
from service.pool.pool import Pool
from service.pool.slots.dedicated_slot import DedicatedSlot
from service.rpc.call_headers import Call
from tests.support.engine.real_engines import ADAPTERS, BASE, ON_ONE_ENGINE, OPTIONS
from tests.support.polling import until

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
    outlasted = False
    # On a busy machine one load may take longer than the answer beside it, but not each of them.
    for number in range(4):
        under_way = asyncio.create_task(answer(engine, "math", 150))
        await until(engine.in_flight, "it runs")
        await engine.load(f"code-{number}", str(ADAPTERS / "code"))
        outlasted = not under_way.done()
        assert (await under_way).startswith(before)
        if outlasted:
            break
    assert outlasted, "every load waited for the requests that ran"
    # More adapters than the engine was started with take turns.
    again, other = await asyncio.gather(*(answer(engine, name) for name in ("math", "code-0")))
    assert again == before != other


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


class Counted:
    """The module's engine as a pool's: it is started already, and counts loads."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine = engine
        self.loaded: list[str] = []

    async def start(self) -> EngineReport:
        return EngineReport("vllm", OPTIONS.max_model_len or 0, GENERATE_ENDPOINTS)

    async def load(self, expert: str, adapter: str | None = None) -> None:
        self.loaded.append(expert)

    async def unload(self, expert: str) -> None:
        raise AssertionError(expert)

    async def run(self, request: EngineRequest, send: Send) -> None:
        await self.engine.run(request, send)

    def failure(self) -> str | None:
        return self.engine.failure()

    async def stop(self) -> None:
        """Leave the engine to the other tests."""


PROMPTS = {
    "/v1/completions": {"prompt": "2 and 2 are", "max_tokens": 8},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/responses": {"input": "hi", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
}


async def test_two_names_answer_from_one_load_with_equal_tokens_and_their_own_name(
    engine: VllmEngine,
) -> None:
    counted = Counted(engine)
    pool = Pool("p")
    slot = DedicatedSlot(
        ("base", "math"),
        lambda: counted,
        capacity=8,
        max_waiting=8,
        start_guess_s=1.0,
        changed=pool.changed,
    )
    pool.add(slot)
    held = {"base": "base", "twin": "base", "math": "math", "maths": "math"}
    pool.serve(held)
    pool.start()

    async def told(name: str, path: str, *, stream: bool) -> tuple[set[str], object]:
        """Return the models that an answer names, and its text."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        body = orjson.dumps({"model": name, "temperature": 0, "stream": stream, **PROMPTS[path]})
        await pool.run(Call(path, name, f"r{next(_ids)}", 60_000, stream, "g", 1), body, send)
        payload = b"".join(message.get("body", b"") for message in sent)
        assert sent[0]["status"] == 200, payload
        if not stream:
            assert int(dict(sent[0]["headers"])[b"content-length"]) == len(payload)
            reply = orjson.loads(payload)
            answers = reply.get("choices") or reply.get("output") or reply["content"]
            return {reply["model"]}, [
                one.get("text") or one.get("message") or one["content"] for one in answers
            ]
        lines = [line[5:] for line in payload.splitlines() if line.startswith(b"data: {")]
        events = [orjson.loads(line) for line in lines]
        inner = [one for e in events for one in (e, e.get("response"), e.get("message"))]
        models = {one["model"] for one in inner if isinstance(one, dict) and "model" in one}
        return models, [e.get("delta") for e in events] + [
            [choice.get("delta") or choice.get("text") for choice in e.get("choices", ())]
            for e in events
        ]

    try:
        for path, stream in itertools.product(PROMPTS, (False, True)):
            # One after the other: sums over a batch of another size are rounded otherwise.
            answers = {name: await told(name, path, stream=stream) for name in held}
            assert {name: models for name, (models, _) in answers.items()} == {
                name: {name} for name in held
            }
            for name, owner in held.items():
                assert _without_ids(answers[name][1]) == _without_ids(answers[owner][1])
        assert counted.loaded == ["base", "math"]
    finally:
        await pool.stop(1)


def _without_ids(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_ids(one) for name, one in value.items() if name != "id"}
    return [_without_ids(one) for one in value] if isinstance(value, list) else value
