"""The simulated engine's ranks, scores and classes have vLLM's shapes and agree with each other."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import SimulatedOptions
from service.engine.simulated_engine import SimulatedEngine
from service.engine.simulated_readings import CLASSES, likeness
from tests.support.engine_requests import ask

QUERY = "a ship in the harbour"
TEXTS = ["two trains leave", "the ship is in the harbour", "a harbour"]


async def answer(path: str, **body: Any) -> Any:
    return (await ask(SimulatedEngine(("e",), SimulatedOptions()), path, "e", body)).json


async def test_ranks_are_scores_in_falling_order() -> None:
    ranks = await answer("/v1/rerank", query=QUERY, documents=TEXTS)
    scores = await answer("/v1/score", text_1=QUERY, text_2=TEXTS)
    by_index = {item["index"]: item["score"] for item in scores["data"]}
    assert [item["index"] for item in ranks["results"]] == [1, 2, 0]
    for item in ranks["results"]:
        assert item["relevance_score"] == by_index[item["index"]]
        assert item["document"] == {"text": TEXTS[item["index"]]}
    assert ranks["usage"]["prompt_tokens"] == 3 * 5 + 3 + 6 + 2
    assert ranks["model"] == scores["model"] == "e"


@pytest.mark.parametrize(("top_n", "shown"), [(1, 1), (2, 2), (9, 3)])
async def test_rerank_answers_at_most_top_n(top_n: int, shown: int) -> None:
    ranks = await answer("/v1/rerank", query=QUERY, documents=TEXTS, top_n=top_n)
    assert len(ranks["results"]) == shown


async def test_scores_of_two_lists_are_of_pairs() -> None:
    scores = await answer("/v1/score", text_1=TEXTS, text_2=TEXTS[::-1])
    expected = [likeness(*pair) for pair in zip(TEXTS, TEXTS[::-1], strict=True)]
    assert [item["score"] for item in scores["data"]] == expected
    assert "error" in await answer("/v1/score", text_1=TEXTS, text_2=TEXTS[:2])


async def test_classes_have_probabilities_and_the_likeliest_as_the_label() -> None:
    classes = await answer("/v1/classify", input=TEXTS)
    for item in classes["data"]:
        assert len(item["probs"]) == item["num_classes"] == len(CLASSES)
        assert sum(item["probs"]) == pytest.approx(1)
        assert item["label"] == CLASSES[item["probs"].index(max(item["probs"]))]
    alone = await answer("/v1/classify", input=TEXTS[0])
    assert alone["data"] == classes["data"][:1]
    assert alone["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
