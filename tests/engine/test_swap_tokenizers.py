"""Experts of one family with different tokenizers: prompts, answers and grammars of each.

The engine runs them with the same weights, so that only the tokenizers differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from service.engine.vllm.swapping_engine import Canary, Weights
from tests.support.engine.real_engines import BASE, ENVIRONMENT, ON_ONE_ENGINE, Swapping, greedy

pytestmark = ON_ONE_ENGINE

GRAMMARS: list[dict[str, Any]] = [
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"structured_outputs": {"regex": "[0-9]{4}-[0-9]{2}"}},
    {"structured_outputs": {"json": {"enum": ["red", "blue"]}}},
]


def _other_tokens(folder: Path) -> str:
    """The base, with the numbers of all its tokens but the special ones the other way round."""
    folder.mkdir()
    for path in Path(BASE).iterdir():
        if path.name != "tokenizer.json" and not path.name.startswith("."):
            os.symlink(path.resolve(), folder / path.name)
    data = json.loads((Path(BASE) / "tokenizer.json").read_text())
    special = {item["id"] for item in data["added_tokens"]}
    ordinary = sorted(i for i in data["model"]["vocab"].values() if i not in special)
    turned = dict(zip(ordinary, reversed(ordinary), strict=True))
    vocabulary = {token: turned.get(i, i) for token, i in data["model"]["vocab"].items()}
    data["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return str(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Swapping]:
    os.environ.update(ENVIRONMENT)
    other = _other_tokens(tmp_path_factory.mktemp("models") / "other")
    canaries: dict[str, Canary] = {}
    made = Swapping("base", {"base": Weights(BASE), "other": Weights(other)}, canaries)
    await made.start()
    await made.load_to_host("other")
    yield made
    await made.stop()


async def _answer(engine: Swapping, expert: str, more: dict[str, Any]) -> str:
    answer = await greedy(engine, expert, "It is", 24, **{"ignore_eos": False, **more})
    return str(answer["text"])


def _fits(text: str, more: dict[str, Any]) -> bool:
    wanted = more["structured_outputs"]
    if "choice" in wanted:
        return text in wanted["choice"]
    if "regex" in wanted:
        return len(text) == 7 and text.replace("-", "0").isdecimal() and text[4] == "-"
    return json.loads(text) in wanted["json"]["enum"]


@pytest.mark.parametrize("more", GRAMMARS, ids=str)
async def test_swap_grammar_uses_the_tokenizer_of_its_expert(
    engine: Swapping, more: dict[str, Any]
) -> None:
    for expert in ("base", "other", "base", "other"):
        if (await engine.worker_rpc("coe_running")) != expert:
            assert (await engine.swap_in(expert)).ok
        text = await _answer(engine, expert, more)
        assert _fits(text, more), (expert, text)


async def test_swap_prompt_and_answer_use_the_tokenizer_of_their_expert(engine: Swapping) -> None:
    fields = {}
    for expert in ("base", "other"):
        if (await engine.worker_rpc("coe_running")) != expert:
            assert (await engine.swap_in(expert)).ok
        answer = await greedy(engine, expert, "It is", 4, logprobs=1)
        fields[expert] = answer["token_ids"]
    # The same weights, asked in other tokens, say something else.
    assert fields["base"] != fields["other"]
