"""Budgets of thinking that are learned from answers."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.broker.thinking_lengths import ThinkingLengths, ThinkingWorth
from service.broker.token_prices import Price
from service.config import Config
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.learned_budgets import LearnedBudgets
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import ExpertCall

CONFIG = Config.model_validate(
    {
        "experts": {
            "plain": {"model": "m", "thinking": True},
            "learns": {"base": "plain", "thinking": {"learned_quantile": 0.9}},
            "both": {"base": "plain", "thinking": {"learned_quantile": 0.9, "budget_tokens": 40}},
        },
        "pools": {"p": {"vllm": {"reasoning_parser": "qwen3"}}},
    }
)


# With such a price no more is left whole than must be.
DEAR = ThinkingWorth(0.5, 1.0)


def call(expert: str, thought: int | None, **more: Any) -> ExpertCall:
    made = {"completion_tokens": (thought or 0) + 10, "reasoning_tokens": thought, **more}
    return ExpertCall(expert, Price(), **made)


def learned(thoughts: list[int]) -> LearnedBudgets:
    budgets = LearnedBudgets(CONFIG, ThinkingLengths())
    for name in CONFIG.experts:
        for thought in thoughts:
            budgets.observe(call(name, thought), "math")
    return budgets


def request_for(**data: Any) -> InferenceRequest:
    messages = [{"role": "user", "content": "q"}]
    raw = orjson.dumps({"model": "auto", "messages": messages, **data})
    return parse_request("/v1/chat/completions", raw, {}, 1000)


@pytest.mark.parametrize(
    ("expert", "category", "data", "budget"),
    [
        ("plain", "math", {}, None),
        ("learns", "math", {}, 91),
        ("learns", "other", {}, 91),
        ("learns", "", {}, 91),
        ("both", "math", {}, 40),
        # Who sets a budget or a high effort has it.
        ("learns", "math", {"thinking_token_budget": 500}, 500),
        ("learns", "math", {"reasoning_effort": "high"}, None),
        ("learns", "math", {"reasoning_effort": "low"}, 91),
        ("both", "math", {"reasoning_effort": "high"}, 40),
        ("learns", "math", {"max_tokens": 40}, 30),
    ],
)
def test_learned_budget_bounds_what_nobody_else_bounds(
    expert: str, category: str, data: dict[str, Any], budget: int | None
) -> None:
    defaults = RequestDefaults(CONFIG, learned([*range(100)]))
    told = defaults.apply(request_for(**data), expert, category, DEAR)
    assert told.thinking_budget == told.data.get("thinking_token_budget") == budget
    # Without its category, as at the request's arrival, and then with it.
    again = defaults.apply(defaults.apply(request_for(**data), expert), expert, category, DEAR)
    assert again.data == told.data


@pytest.mark.parametrize(
    ("more", "cut"),
    [
        ({}, False),
        ({"thinking_budget": 100}, True),
        ({"thinking_budget": 101}, True),
        ({"thinking_budget": 102}, False),
        # The answer ended before its thinking did.
        ({"completion_tokens": 100, "ended": False}, True),
        ({"completion_tokens": 100, "most_tokens": 100}, True),
        ({"completion_tokens": 200, "most_tokens": 200}, False),
        ({"reasoning_tokens": 300, "answers": 3, "thinking_budget": 100}, True),
    ],
)
def test_observe_tells_thoughts_that_were_cut(more: dict[str, Any], cut: bool) -> None:
    seen: list[tuple[int, bool]] = []

    class Recorded(ThinkingLengths):
        def observe(self, expert: str, category: str, tokens: int, *, cut: bool) -> None:
            assert (expert, category) == ("learns", "math")
            seen.append((tokens, cut))

    LearnedBudgets(CONFIG, Recorded()).observe(call("learns", 100, **more), "math")
    assert seen == [(100, cut)]


def test_observe_without_a_count_learns_nothing() -> None:
    budgets = learned([*range(100)])
    before = budgets.budget("learns", "math", DEAR)
    for _ in range(500):
        budgets.observe(call("learns", None, completion_tokens=5000), "math")
    assert budgets.budget("learns", "math", DEAR) == before == 91


def test_learned_budget_needs_a_price() -> None:
    assert learned([*range(100)]).budget("learns", "math", ThinkingWorth(0.5, 0.0)) is None


def test_saved_thinking_is_what_a_request_s_budget_cuts_off() -> None:
    defaults = RequestDefaults(CONFIG, learned([100] * 60))
    names = [*CONFIG.experts]
    assert defaults.saved_thinking(request_for(), names, "math") is None
    saved = defaults.saved_thinking(request_for(thinking_token_budget=30), names, "math")
    assert saved is not None
    assert saved.tolist() == [70.0, 70.0, 70.0]
