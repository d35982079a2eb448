"""From what was asked to who shall answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from service.api.body import read_asked
from service.api.plan import Plan, Planner
from service.config import Config
from service.errors import InvalidRequest, UnknownModel
from service.types import CategoryScores

CONFIG = Config.model_validate(
    {
        "experts": {
            "general": {"model": "m", "categories": ["general"]},
            "math": {"model": "m", "categories": ["math"], "capabilities": ["chat"]},
            "vectors": {"model": "m", "capabilities": ["embeddings"]},
        },
        "pools": {"cpu": {"engine": "simulated"}},
    }
)


def scores(category: str) -> CategoryScores:
    return CategoryScores(("general", category), (0.1, 0.9), category, 0.9, 0.0)


def plan(model: str, category: str | None = None, **more: Any) -> Plan:
    data = {"model": model, "messages": [{"role": "user", "content": "x"}], **more}
    asked = read_asked("/v1/chat/completions", orjson.dumps(data), {}, 1000)

    def classify(body: Mapping[str, Any]) -> CategoryScores:
        assert body == data
        assert category is not None
        return scores(category)

    return Planner(CONFIG, classify if category else None).plan(asked)


def test_a_named_expert_is_not_classified() -> None:
    assert plan("math") == Plan(("math",), "", 1.0, "named")


def test_auto_goes_by_category_with_the_fallback_behind() -> None:
    got = plan("auto", "math")
    assert got.preference == ("math", "general")
    assert (got.category, got.confidence, got.reason) == ("math", 0.9, "classified")


def test_a_category_without_an_expert_goes_to_the_fallback() -> None:
    got = plan("auto", "poetry")
    assert got.preference == ("general",)
    assert got.reason == "category without an expert"


def test_auto_without_a_classifier_is_the_fallback() -> None:
    assert plan("auto").preference == ("general",)


def test_a_named_category() -> None:
    assert plan("auto/math").preference == ("math", "general")
    with pytest.raises(UnknownModel) as caught:
        plan("auto/poetry")
    assert caught.value.message == "no category 'poetry'; categories: general, math"
    assert caught.value.param == "model"


def test_who_is_not_able_is_passed_over() -> None:
    tools = [{"type": "function"}]
    assert plan("auto", "math", tools=tools).preference == ("general",)
    with pytest.raises(InvalidRequest) as caught:
        plan("math", tools=tools)
    assert caught.value.message == "expert 'math' can't do tools; it can do chat"
    assert caught.value.param == "model"


def test_an_expert_that_is_neither_chosen_nor_fallback_is_the_last_resort() -> None:
    data = orjson.dumps({"input": "x"})
    asked = read_asked("/v1/embeddings", data, {}, 1000)
    assert Planner(CONFIG, None).plan(asked).preference == ("vectors",)


def test_an_unknown_model_is_told_what_there_is() -> None:
    with pytest.raises(UnknownModel) as caught:
        plan("maths")
    assert caught.value.message == (
        "the model 'maths' does not exist. Did you mean 'math'? "
        "Models: auto, general, math, vectors"
    )
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["x" * 10_000, "auto/" + "x" * 10_000])
def test_a_monstrous_name_is_not_echoed(model: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        plan(model)
    assert len(caught.value.message) < 400
