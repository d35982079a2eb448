"""Budgets of thinking in a real engine, from each form of request to the end of the thinking.

The demo's model gets marks of thinking in place of tokens that it never uses. Two experts run in
one engine, and their tokenizers have other numbers for the marks.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from service.config import Config
from service.engine.engine_interface import EngineRequest, Message
from service.engine.vllm.swapping_engine import Canary, Weights
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import parse_request
from tests.support.engine.real_engines import BASE, ENVIRONMENT, ON_ONE_ENGINE, OPTIONS, Swapping

pytestmark = ON_ONE_ENGINE

BUDGET, MOST = 6, 24
MARKS = {"base": (3, 4), "other": (7, 8)}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}"
)
PATHS = {
    "/v1/chat/completions": {"max_tokens": MOST, "ignore_eos": True},
    "/v1/responses": {"max_output_tokens": MOST, "ignore_eos": True},
    "/v1/messages": {"max_tokens": MOST},
}
FORMS: list[dict[str, Any]] = [
    {"thinking": {"type": "enabled", "budget_tokens": BUDGET}},
    {"thinking_token_budget": BUDGET, "enable_thinking": True},
]
CONFIG = Config.model_validate(
    {
        "experts": {name: {"model": name} for name in MARKS},
        "pools": {"p": {"vllm": {"reasoning_parser": "qwen3"}}},
    }
)
_count = itertools.count()


def _thinker(folder: Path, marks: tuple[int, int]) -> str:
    """The base, with marks of thinking in place of two special tokens."""
    folder.mkdir()
    for path in Path(BASE).iterdir():
        if path.name not in ("tokenizer.json", "chat_template.jinja") and path.name[0] != ".":
            os.symlink(path.resolve(), folder / path.name)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    data = json.loads((Path(BASE) / "tokenizer.json").read_text())
    names = dict(zip(marks, ("<think>", "</think>"), strict=True))
    vocabulary: dict[str, int] = data["model"]["vocab"]
    data["model"]["vocab"] = {names.get(i, token): i for token, i in vocabulary.items()}
    for item in data["added_tokens"]:
        if item["id"] in names:
            item |= {"content": names[item["id"]], "special": False}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return str(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Swapping]:
    os.environ.update(ENVIRONMENT)
    folder = tmp_path_factory.mktemp("models")
    weights = {name: Weights(_thinker(folder / name, marks)) for name, marks in MARKS.items()}
    canaries: dict[str, Canary] = {}
    options = OPTIONS.model_copy(update={"reasoning_parser": "qwen3"})
    made = Swapping("base", weights, canaries, options)
    await made.start()
    await made.load_to_host("other")
    yield made
    await made.stop()


async def _answer(engine: Swapping, expert: str, path: str, form: dict[str, Any]) -> Any:
    """What the engine answers to what the gateway makes of a client's request."""
    prompt = [{"role": "user", "content": "What is a harbour?"}]
    name = "input" if path == "/v1/responses" else "messages"
    raw = orjson.dumps({"model": expert, name: prompt, "temperature": 0, **PATHS[path], **form})
    request = RequestDefaults(CONFIG).apply(parse_request(path, raw, {}, 1000), expert)
    parts: list[bytes] = []

    async def collect(message: Message) -> None:
        parts.append(message.get("body", b""))

    body = request.body_for(expert)
    await engine.run(EngineRequest(path, expert, body, f"think-{next(_count)}"), collect)
    return orjson.loads(b"".join(parts))


def _parts(path: str, answer: Any) -> tuple[str, str, int | None]:
    """The thinking, the rest of the answer, and the tokens of the thinking where they are told."""
    assert "error" not in answer or answer["error"] is None, answer
    if path == "/v1/chat/completions":
        message = answer["choices"][0]["message"]
        tokens = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
        return message["reasoning"] or "", message["content"] or "", tokens
    if path == "/v1/responses":
        texts = {item["type"]: item["content"][0]["text"] for item in answer["output"]}
        tokens = answer["usage"]["output_tokens_details"]["reasoning_tokens"]
        return texts.get("reasoning", ""), texts.get("message", ""), tokens
    found = {block["type"]: block for block in answer["content"]}
    thought = found.get("thinking", {}).get("thinking", "")
    return thought, found.get("text", {}).get("text", ""), None


async def test_budget_ends_the_thinking_on_every_endpoint_and_after_every_swap(
    engine: Swapping,
) -> None:
    for expert in ("base", "other", "base"):
        if (await engine.worker_rpc("coe_running")) != expert:
            assert (await engine.swap_in(expert)).ok
        for path in PATHS:
            free, _, without = _parts(path, await _answer(engine, expert, path, {}))
            for form in FORMS:
                thought, rest, tokens = _parts(path, await _answer(engine, expert, path, form))
                where = (expert, path, form, thought, rest)
                assert free.startswith(thought.strip()), where
                assert len(thought) < len(free), where
                assert rest, where
                if tokens is not None:
                    assert 0 < tokens <= BUDGET, where
                    assert (without or 0) > BUDGET, where


async def test_no_thinking_is_no_thinking(engine: Swapping) -> None:
    expert = await engine.worker_rpc("coe_running")
    for path in PATHS:
        answer = await _answer(engine, str(expert), path, {"reasoning_effort": "none"})
        thought, rest, tokens = _parts(path, answer)
        assert (thought, bool(rest), tokens or 0) == ("", True, 0), path
