"""From what was asked to who shall answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from service.broker.cost_model import CostModel
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest
from service.broker.token_prices import Price
from service.classifier.classifier import Assessment
from service.classifier.topic_filter import Topics
from service.config import Config, RouterConfig
from service.errors import ForbiddenError, InvalidRequestError, UnknownModelError
from service.gateway.request.parsing import parse_request
from service.gateway.routing.candidate_planner import PRESETS, CandidatePlanner, selection_request
from service.gateway.routing.quality_model import QualityModel
from service.gateway.routing.route_plan import RoutePlan
from service.gateway.routing.routing_setup import (
    RoutingSetup,
    artifact_of,
    category_warnings,
    encoder_of,
)
from service.gateway.routing.session_affinity import SessionLookup
from service.gateway.routing.session_memory import SessionTurn
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


def in_session(
    last_turn: list[float], topics: Topics, *, certain: bool = True, is_open: bool = False
) -> RoutePlan:
    """The plan for a turn that is math by its text, in a conversation with these topics."""
    found = CategoryScores(("code", "math"), (0.4, 0.6), "math", 0.6, 0.0)

    def assess(body: Mapping[str, Any]) -> Assessment:
        return Assessment(found, np.zeros(0), np.array(last_turn))

    worth = QualityModel(CONFIG, BOOK, ("code", "math"))
    data = {"model": "auto", "messages": [{"role": "user", "content": "x"}]}
    asked = parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000)
    state = replace(asked.turn, open=is_open)
    turn = SessionTurn("d", "general", "general", "code", "boot", 10, 1.0, topics=topics)
    session = SessionLookup("t", "n", state, turn, certain)
    return CandidatePlanner(CONFIG, BOOK, worth, assess, np.ones(3)).plan(asked, session=session)


def test_plan_doubtful_turn_of_a_conversation_is_classified_by_its_topics() -> None:
    code: Topics = (("code", 1.0),)
    assert in_session([0.4, 0.6], code).category == "code"
    assert in_session([0.01, 0.99], code).category == "math"
    # Another conversation of the same session says nothing of this one.
    assert in_session([0.4, 0.6], code, certain=False).category == "math"
    assert in_session([0.4, 0.6], ()).category == "math"


def test_plan_tool_result_has_the_topics_of_its_conversation() -> None:
    got = in_session([0.01, 0.99], (("code", 0.9), ("math", 0.1)), is_open=True)
    assert got.category == "code"
    assert dict(got.topics) == {"code": 0.9, "math": 0.1}


def router(category: str | None, expected: Any = None) -> CandidatePlanner:
    def assess(body: Mapping[str, Any]) -> Assessment:
        assert expected is None or body == expected
        assert category is not None
        return Assessment(scores(category), np.zeros(0))

    worth = QualityModel(CONFIG, BOOK, ("general", category) if category else ())
    return CandidatePlanner(CONFIG, BOOK, worth, assess if category else None, np.ones(3))


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


def test_plan_named_expert_skips_the_classifier() -> None:
    got = plan("math")
    assert (names(got), got.category, got.reason) == (("math",), "", "named")


def test_plan_auto_ranks_by_category_with_the_fallback_last() -> None:
    got = plan("auto", "math")
    assert names(got) == ("math", BOTH.name, "general")
    assert got.quality.tolist() == pytest.approx([0.55, 0.9, 0.81])
    assert (got.category, got.confidence, got.reason) == ("math", 0.9, "classified")


WAYS = Config.model_validate(
    {
        "experts": {
            "fast": {"model": "m", "thinking": False, "categories": ["general"]},
            "think": {"base": "fast", "thinking": True, "categories": ["math"]},
            "either": {"model": "n", "categories": ["law"], "quality": {"general": 0.2}},
        },
        "recipes": {"both": {"kind": "cascade", "members": ["fast"], "later": ["think"]}},
        "pools": {"cpu": {"engine": "simulated"}},
    }
)


def plan_by_thinking(model: str, tenant: Tenant | None = None, **more: Any) -> set[str]:
    """The experts that may answer."""
    book = RecipeCatalog(tuple(WAYS.experts), [r.recipe() for r in WAYS.recipes.values()])
    worth = QualityModel(WAYS, book, ("general", "math", "law"))
    data = {"model": model, "messages": [{"role": "user", "content": "x"}], **more}
    asked = parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000)
    asked = replace(asked, tenant=tenant or asked.tenant)
    found = CandidatePlanner(WAYS, book, worth, None, np.ones(3)).plan(asked)
    return {name for row in found.rows.tolist() for name in book.recipes[row].experts}


@pytest.mark.parametrize(
    ("more", "left"),
    [
        ({"reasoning_effort": "none"}, {"fast", "either"}),
        ({"enable_thinking": False}, {"fast", "either"}),
        ({"thinking": {"type": "disabled"}}, {"fast", "either"}),
        ({"reasoning_effort": "low"}, {"think", "either"}),
        ({"thinking": {"type": "enabled", "budget_tokens": 99}}, {"think", "either"}),
        ({"thinking_token_budget": 99}, {"fast", "think", "either"}),
        ({}, {"fast", "think", "either"}),
    ],
)
def test_plan_thinking_of_a_request_leaves_the_ways_that_can(
    more: dict[str, Any], left: set[str]
) -> None:
    found = plan_by_thinking("auto", **more)
    # Of those that are left, the ones without any quality here are dropped.
    assert found <= left
    for name in WAYS.experts:
        if name in left:
            assert plan_by_thinking(name, **more) == {name}
        else:
            with pytest.raises(InvalidRequestError, match=f"expert '{name}' .* thinks"):
                plan_by_thinking(name, **more)


def test_plan_thinking_that_no_way_has_names_each_and_hides_those_of_other_tenants() -> None:
    only = Tenant("t", experts=frozenset({"fast"}))
    with pytest.raises(InvalidRequestError) as caught:
        plan_by_thinking("auto", only, reasoning_effort="low")
    assert caught.value.message == "`reasoning_effort` can't be kept: expert 'fast' never thinks"
    assert caught.value.param == "reasoning_effort"
    with pytest.raises(InvalidRequestError, match="'fast' never thinks"):
        plan_by_thinking("both", reasoning_effort="low")


def test_plan_auto_category_without_an_expert_uses_the_fallback() -> None:
    got = plan("auto", "poetry")
    assert names(got) == ("general",)
    assert got.reason == "category without an expert"


def test_plan_auto_without_a_classifier_uses_the_fallback() -> None:
    assert names(plan("auto")) == ("general",)


def test_plan_auto_with_a_named_category_uses_it_and_unknown_raises() -> None:
    assert names(plan("auto/math")) == ("math", BOTH.name, "general")
    with pytest.raises(UnknownModelError) as caught:
        plan("auto/poetry")
    assert caught.value.message == "no category 'poetry'; categories: general, math"
    assert caught.value.param == "model"


def test_plan_expert_without_the_needed_capability_is_skipped_or_raises() -> None:
    tools = [{"type": "function"}]
    assert names(plan("auto", "math", tools=tools)) == ("general",)
    with pytest.raises(InvalidRequestError) as caught:
        plan("math", tools=tools)
    told = "expert 'math' can't do tools; it can do chat; these can: general"
    assert caught.value.message == told
    assert caught.value.param == "model"


def left_out(category: str, tenant: Tenant | None = None, **more: Any) -> dict[str, str]:
    """The recipes that are no candidates, with the reasons."""
    asked = parse_request(
        "/v1/chat/completions",
        orjson.dumps({"model": "auto", "messages": [{"role": "user", "content": "x"}], **more}),
        {},
        1000,
    )
    if tenant is not None:
        asked = replace(asked, tenant=tenant)
    planner = router(category)
    got = planner.plan(asked)
    told = planner.left_out(asked, got)
    assert not {one.row for one in told} & set(got.rows.tolist())
    assert [one.quality for one in told] == sorted((one.quality for one in told), reverse=True)
    return {BOOK.recipes[one.row].name: one.why for one in told}


def test_left_out_recipes_are_told_with_the_reason() -> None:
    tools = [{"type": "function"}]
    small = "its expected quality is less than 0.05"
    assert left_out("math") == {"vectors": "it can't do chat"}
    assert left_out("general")["math"].startswith(small)
    assert left_out("math", tools=tools) == {
        "math": "it can't do tools",
        "vectors": "it can't do chat, tools",
        BOTH.name: "it can't do tools",
    }
    several = left_out("math", n=2)[BOTH.name]
    assert several.startswith("it asks several experts")
    # Nobody is told of what the key may not ask.
    limited = Tenant("t", experts=frozenset({"general", "vectors"}))
    assert set(left_out("math", limited)) == {"vectors"}
    named = {"model": "math", "messages": [{"role": "user", "content": "x"}]}
    asked = parse_request("/v1/chat/completions", orjson.dumps(named), {}, 1000)
    assert not router("math").left_out(asked, plan("math"))


def test_plan_auto_last_resort_is_any_capable_expert() -> None:
    data = orjson.dumps({"input": "x"})
    asked = parse_request("/v1/embeddings", data, {}, 1000)
    assert names(router(None).plan(asked)) == ("vectors",)


def test_plan_unknown_model_raises_with_suggestion_and_list() -> None:
    with pytest.raises(UnknownModelError) as caught:
        plan("maths")
    assert caught.value.message == (
        "the model 'maths' does not exist. Did you mean 'math'? "
        "Models: auto, general, math, vectors, both"
    )
    assert caught.value.param == "model"


@pytest.mark.parametrize("model", ["x" * 10_000, "auto/" + "x" * 10_000])
def test_plan_very_long_model_name_is_not_echoed(model: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        plan(model)
    assert len(caught.value.message) < 400


def test_plan_named_recipe_with_unsupported_options_raises() -> None:
    got = plan("both")
    assert names(got) == (BOTH.name,)
    assert got.escalation_prob.tolist() == [[0.5, 0, 0]]
    for more in ({"n": 2}, {"logprobs": True}):
        with pytest.raises(InvalidRequestError) as caught:
            plan("both", **more)
        assert "asks several experts" in caught.value.message


@pytest.mark.parametrize("more", [{"n": 2}, {"logprobs": True}])
def test_plan_auto_with_several_answers_or_logprobs_excludes_recipes(more: dict[str, Any]) -> None:
    assert names(plan("auto", "math", **more)) == ("math", "general")


def test_plan_tenant_is_limited_to_its_experts() -> None:
    only = Tenant("t", experts=frozenset({"general"}))
    assert names(plan("auto", "math", only)) == ("general",)
    for model in ("math", "both"):
        with pytest.raises(ForbiddenError):
            plan(model, tenant=only)
    with pytest.raises(ForbiddenError):
        plan("auto", "math", Tenant("t", experts=frozenset()))


SIZES = {"general": 8.0, "math": 70.0, "vectors": 1.0}


def priced(model: str, scale: float, category: str = "math", tokens: int = 60) -> SelectionRequest:
    """A request as the selection sees it, where every price is multiplied by `scale`."""
    prices = {name: Price(scale * size, scale * size) for name, size in SIZES.items()}
    cost_model = CostModel(BOOK.experts, ("general", "math"), prices)
    worth = QualityModel(CONFIG, BOOK, ("general", "math"))
    found = CandidatePlanner(CONFIG, BOOK, worth, None, cost_model.per_token)
    data = {"model": f"{model}/{category}", "messages": [{"role": "user", "content": "x" * tokens}]}
    asked = parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000)
    return selection_request(cost_model, asked, found.plan(asked), budget_price=0.5)


@pytest.mark.parametrize("model", ["auto:fast", "auto", "auto:best"])
@pytest.mark.parametrize("tokens", [60, 60_000])
def test_selection_request_preset_weighs_cost_by_the_composition_s_own_level(
    model: str, tokens: int
) -> None:
    preset = RouterConfig().presets.of(model.partition(":")[2])
    shares = []
    for scale in (1e-6, 1.0, 1e6):
        got = priced(model, scale, tokens=tokens)
        assert got.budget_price == 0.5
        # `general` is the best on its own category, `math` on the other; `vectors` can't chat.
        level = (got.cost[0] + got.cost[1]) / 2
        shares.append((got.cost_price - 0.5) * level)
    assert shares == pytest.approx([preset.cost_weight] * 3)
    assert got.time_price == preset.time_price


def test_selection_request_free_experts_have_no_price_of_cost() -> None:
    assert priced("auto", 0.0).cost_price == 0.5


def test_selection_request_named_expert_has_no_price_of_cost() -> None:
    asked = parse_request(
        "/v1/chat/completions",
        orjson.dumps({"model": "math", "messages": [{"role": "user", "content": "x"}]}),
        {},
        1000,
    )
    cost_model = CostModel(BOOK.experts, (), {name: Price(1, 1) for name in SIZES})
    assert selection_request(cost_model, asked, router(None).plan(asked)).cost_price == 0


def test_presets_are_three_points_from_cheap_and_quick_to_good() -> None:
    presets = [RouterConfig().presets.of(name) for name in PRESETS]
    for figure in ("point_cost", "point_s"):
        values = [getattr(preset, figure) for preset in presets]
        assert values == sorted(values)
        assert len(set(values)) == 3
    assert [round(0.5 / preset.time_price, 6) for preset in presets] == [2, 10, 60]


EXAMPLES = {"legal": {"expert": "math", "examples": [f"is it legal to do {i}" for i in range(10)]}}


@pytest.mark.parametrize(
    ("more", "model"),
    [
        ({}, None),
        ({"router": {"encoder": {}}}, "use-multilingual-v3"),
        ({"router": {"encoder": {"model": "all-minilm-l6-v2"}}}, "all-minilm-l6-v2"),
        ({"router": {"artifact": "none", "encoder": {}}}, "all-minilm-l6-v2"),
    ],
)
def test_encoder_of_a_config_is_its_own_or_that_of_the_artifact(
    more: dict[str, Any], model: str | None
) -> None:
    assert encoder_of(Config.model_validate({**CONFIG.model_dump(), **more})) == model


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({}, "general@2"),
        ({"router": {"fallback": "math"}}, "general@2"),
        ({"router": {"artifact": "none"}}, None),
        ({"categories": EXAMPLES}, None),
    ],
)
def test_artifact_of_a_config_is_the_built_in_one_unless_it_says_otherwise(
    more: dict[str, Any], name: str | None
) -> None:
    found = artifact_of(Config.model_validate({**CONFIG.model_dump(), **more}))
    assert (None if found is None else found.name) == name


@pytest.mark.parametrize(
    ("labels", "missing"),
    [
        ((), ()),
        (("general", "math", "law"), ()),
        (("general", "law"), ("'math' (experts.math.categories)",)),
    ],
)
def test_category_warnings_name_what_the_classifier_lacks_and_what_it_has(
    labels: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    lines = category_warnings(CONFIG, labels)
    assert len(lines) == len(missing)
    for line, part in zip(lines, missing, strict=True):
        assert part in line
        assert line.endswith("It has law")


def test_plan_leaves_experts_to_clients_that_name_them() -> None:
    """Neither alone nor in a recipe does `auto` ask an expert with `auto: false`."""
    given = CONFIG.model_dump(exclude_defaults=True)
    given["experts"]["math"] = {"model": "m", "auto": False}
    config = Config.model_validate(given)
    labels = ("general", "math")
    worth = QualityModel(config, BOOK, labels)

    def assess(_: Mapping[str, Any]) -> Assessment:
        return Assessment(scores("math"), np.zeros(0))

    made = CandidatePlanner(config, BOOK, worth, assess, np.ones(3))
    for model, expected in (
        ("auto", {"general"}),
        ("auto:best", {"general"}),
        ("auto/general", {"general"}),
        ("math", {"math"}),
        ("both", {BOTH.name}),
    ):
        data = {"model": model, "messages": [{"role": "user", "content": "x"}]}
        found = made.plan(parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000))
        assert set(names(found)) == expected, model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": {"math": {"auto": False}}}, "neither categories nor quality"),
        ({"experts": {"vectors": {"auto": False}}, "router": {"fallback": "vectors"}}, "fallback"),
        (
            {
                "experts": {"vectors": {"auto": False}},
                "categories": {"x": {"description": "d", "examples": ["a"], "expert": "vectors"}},
            },
            "sends it no prompt",
        ),
    ],
)
def test_config_refuses_categories_of_an_expert_that_auto_never_asks(
    change: dict[str, dict[str, Any]], message: str
) -> None:
    given = CONFIG.model_dump(exclude_defaults=True)
    for section, entries in change.items():
        for name, value in entries.items():
            place = given.setdefault(section, {})
            place[name] = {**place.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=message):
        Config.model_validate(given)


def test_plan_recruits_only_experts_that_the_key_may_use() -> None:
    given = Config.model_validate(
        {
            "experts": {name: {"model": "m", "categories": ["general"]} for name in "abcd"},
            "router": {"artifact": "none"},
            "recipes": {
                "panel": {
                    "kind": "recruit",
                    "recruit": {"k": 2, "among": ["a", "b", "c", "d"]},
                    "quality": {"general": 1.0},
                }
            },
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    setup = RoutingSetup(given)
    row = setup.catalog.recipe_index[given.recipes["panel"].recipe()]

    def plan(model: str, *experts: str) -> RoutePlan:
        body = orjson.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]})
        tenant = Tenant(experts=frozenset(experts)) if experts else Tenant()
        asked = parse_request("/v1/chat/completions", body, {}, 1000, tenant)
        return setup.planner.plan(asked)

    for model in ("auto", "panel"):
        assert row in plan(model).rows
        assert row in plan(model, "b", "d").rows
        recruitable = plan(model, "b", "d").recruitable
        assert recruitable is not None
        assert recruitable.tolist() == [False, True, False, True]
    assert row not in plan("auto", "b").rows
    assert plan("panel", "b", "d").first == "b"
    with pytest.raises(ForbiddenError, match="may not use recipe 'panel'"):
        plan("panel", "b")
