"""From what was asked to who shall answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from service.broker.recipe_catalog import RecipeCatalog
from service.classifier.classifier import Assessment
from service.config import Config
from service.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from service.gateway.request.parsing import parse_request
from service.gateway.routing.candidates import RoutePlan, SemanticRouter
from service.gateway.routing.quality import QualityModel
from service.types import CategoryScores, Recipe, Tenant

CONFIG = Config.model_validate(
    {
        "experts": {
            "general": {"model": "m", "categories": ["general"]},
            "math": {"model": "m", "categories": ["math"], "capabilities": ["chat"]},
            "vectors": {"model": "m", "capabilities": ["embeddings"]},
        },
        "recipes": {
            "both": {
                "kind": "cascade",
                "members": ["general"],
                "later": ["math"],
                "quality": {"math": 0.9},
            }
        },
        "pools": {"cpu": {"engine": "simulated"}},
    }
)
BOTH = Recipe("cascade", ("general",), ("math",))
BOOK = RecipeCatalog(tuple(CONFIG.experts), [BOTH])


def scores(category: str) -> CategoryScores:
    return CategoryScores(("general", category), (0.1, 0.9), category, 0.9, 0.0)


def router(category: str | None, expected: Any = None) -> SemanticRouter:
    def assess(body: Mapping[str, Any]) -> Assessment:
        assert expected is None or body == expected
        assert category is not None
        return Assessment(scores(category), np.zeros(0))

    worth = QualityModel(CONFIG, BOOK, ("general", category) if category else ())
    return SemanticRouter(CONFIG, BOOK, worth, assess if category else None)


def plan(
    model: str, category: str | None = None, tenant: Tenant | None = None, **more: Any
) -> RoutePlan:
    data = {"model": model, "messages": [{"role": "user", "content": "x"}], **more}
    asked = parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000)
    if tenant is not None:
        asked = replace(asked, tenant=tenant)
    return router(category, data).plan(asked)


def names(got: RoutePlan) -> tuple[str, ...]:
    """The recipes, best first."""
    order = np.argsort(-got.quality, kind="stable")
    return tuple(BOOK.recipes[int(got.rows[i])].name for i in order)


def test_a_named_expert_is_not_classified() -> None:
    got = plan("math")
    assert (names(got), got.category, got.reason) == (("math",), "", "named")


def test_auto_goes_by_category_with_the_fallback_behind() -> None:
    got = plan("auto", "math")
    assert names(got) == ("math", BOTH.name, "general")
    assert got.quality.tolist() == pytest.approx([0.55, 0.9, 0.81])
    assert (got.category, got.confidence, got.reason) == ("math", 0.9, "classified")


def test_a_category_without_an_expert_goes_to_the_fallback() -> None:
    got = plan("auto", "poetry")
    assert names(got) == ("general",)
    assert got.reason == "category without an expert"


def test_auto_without_a_classifier_is_the_fallback() -> None:
    assert names(plan("auto")) == ("general",)


def test_a_named_category() -> None:
    assert names(plan("auto/math")) == ("math", BOTH.name, "general")
    with pytest.raises(UnknownModelError) as caught:
        plan("auto/poetry")
    assert caught.value.message == "no category 'poetry'; categories: general, math"
    assert caught.value.param == "model"


def test_who_is_not_able_is_passed_over() -> None:
    tools = [{"type": "function"}]
    assert names(plan("auto", "math", tools=tools)) == ("general",)
    with pytest.raises(InvalidRequestError) as caught:
        plan("math", tools=tools)
    assert caught.value.message == "expert 'math' can't do tools; it can do chat"
    assert caught.value.param == "model"


def test_an_expert_that_is_neither_chosen_nor_fallback_is_the_last_resort() -> None:
    data = orjson.dumps({"input": "x"})
    asked = parse_request("/v1/embeddings", data, {}, 1000)
    assert names(router(None).plan(asked)) == ("vectors",)


def test_an_unknown_model_is_told_what_there_is() -> None:
    with pytest.raises(UnknownModelError) as caught:
        plan("maths")
    assert caught.value.message == (
        "the model 'maths' does not exist. Did you mean 'math'? "
        "Models: auto, general, math, vectors, both"
    )
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["x" * 10_000, "auto/" + "x" * 10_000])
def test_a_monstrous_name_is_not_echoed(model: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        plan(model)
    assert len(caught.value.message) < 400


def test_a_recipe_may_be_named_and_is_refused_what_it_cannot_do() -> None:
    got = plan("both")
    assert names(got) == (BOTH.name,)
    assert got.reach.tolist() == [[0.5, 0, 0]]
    for more in ({"n": 2}, {"logprobs": True}):
        with pytest.raises(InvalidRequestError) as caught:
            plan("both", **more)
        assert "asks several experts" in caught.value.message


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": True}])
def test_what_cannot_be_compared_is_left_to_single_experts(more: dict[str, Any]) -> None:
    assert names(plan("auto", "math", **more)) == ("math", "general")


def test_a_tenant_asks_only_whom_it_may() -> None:
    only = Tenant("t", experts=frozenset({"general"}))
    assert names(plan("auto", "math", only)) == ("general",)
    for model in ("math", "both"):
        with pytest.raises(ForbiddenError):
            plan(model, tenant=only)
    with pytest.raises(ForbiddenError):
        plan("auto", "math", Tenant("t", experts=frozenset()))
