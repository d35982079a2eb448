"""What a request says about thinking, in the fields of every API."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import InvalidRequestError
from service.gateway.request.thinking_terms import EFFORTS, NO_TERMS, thinking_terms

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def said(data: dict[str, Any], path: str = CHAT) -> tuple[bool | None, str | None, int | None]:
    terms = thinking_terms(path, data)
    return terms.enabled, terms.effort, terms.budget_tokens


def arguments(**given: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": given}


def enabled(budget: int) -> dict[str, Any]:
    return {"type": "enabled", "budget_tokens": budget}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("data", "meant"),
    [
        ({}, (None, None, None)),
        *[({"reasoning_effort": e}, (e != "none", e, None)) for e in EFFORTS],
        *[({"reasoning": {"effort": e}}, (e != "none", e, None)) for e in EFFORTS],
        ({"reasoning": {"summary": "auto"}}, (None, None, None)),
        ({"output_config": {"effort": "low"}}, (None, "low", None)),
        ({"thinking": {"type": "enabled"}}, (True, None, None)),
        ({"thinking": enabled(7)}, (True, None, 7)),
        ({"thinking": {"type": "disabled"}}, (False, None, None)),
        ({"thinking": {"type": "adaptive"}}, (None, None, None)),
        ({"enable_thinking": True}, (True, None, None)),
        (arguments(enable_thinking=False), (False, None, None)),
        (arguments(thinking=True), (True, None, None)),
        (arguments(reasoning_effort="high"), (True, "high", None)),
        (arguments(tone="dry"), (None, None, None)),
        ({"thinking_token_budget": 9}, (None, None, 9)),
        ({"thinking_token_budget": 0}, (False, None, None)),
        ({"thinking_token_budget": -1}, (None, None, None)),
        ({"enable_thinking": True, "thinking": enabled(5)}, (True, None, 5)),
        ({"output_config": {"effort": "max"}, "thinking": enabled(5)}, (True, "max", 5)),
    ],
)
def test_terms_of_each_field_are_the_same_on_every_chat_endpoint(
    path: str, data: dict[str, Any], meant: tuple[bool | None, str | None, int | None]
) -> None:
    assert said(data, path) == meant


@pytest.mark.parametrize(
    ("data", "message", "param"),
    [
        (
            {"reasoning_effort": "hihg"},
            "`reasoning_effort` must be one of none, minimal, low, medium, high, xhigh, max",
            "reasoning_effort",
        ),
        ({"reasoning": {"effort": 3}}, "`reasoning.effort` must be one of", "reasoning.effort"),
        ({"enable_thinking": "yes"}, "`enable_thinking` must be true or false", "enable_thinking"),
        (
            arguments(thinking=1),
            "`chat_template_kwargs.thinking` must be true or false",
            "chat_template_kwargs.thinking",
        ),
        ({"thinking": True}, "`thinking` must be an object whose `type` is", "thinking"),
        ({"thinking": {"type": ["enabled"]}}, "`thinking` must be an object", "thinking"),
        (
            {"thinking": {"type": "disabled", "budget_tokens": 5}},
            "`thinking.budget_tokens` needs the type enabled, not disabled",
            "thinking.budget_tokens",
        ),
        (
            {"thinking": enabled(0)},
            "`thinking.budget_tokens` must be an integer of at least 1",
            "thinking.budget_tokens",
        ),
        *[
            (
                {"thinking_token_budget": wrong},
                "`thinking_token_budget` must be an integer of at least 0, or -1 for no bound",
                "thinking_token_budget",
            )
            for wrong in (True, 1.5, "9", -2, 2**40)
        ],
        (
            {"reasoning_effort": "none", "thinking": enabled(5)},
            "`reasoning_effort` and `thinking` contradict each other",
            "thinking",
        ),
        (
            {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
            "`reasoning_effort` and `reasoning.effort` contradict each other",
            "reasoning.effort",
        ),
        (
            {"enable_thinking": True, "thinking_token_budget": 0},
            "`enable_thinking` and `thinking_token_budget` contradict each other",
            "thinking_token_budget",
        ),
        (
            {"thinking": enabled(5), "max_tokens": 5},
            "`thinking.budget_tokens` must be less than `max_tokens` (5): "
            "thinking counts against it",
            "thinking.budget_tokens",
        ),
        (
            {"thinking_token_budget": 9, "max_completion_tokens": 8},
            "`thinking_token_budget` must be less than `max_completion_tokens` (8)",
            "thinking_token_budget",
        ),
    ],
)
def test_terms_that_are_wrong_are_refused_with_what_is_allowed(
    data: dict[str, Any], message: str, param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        thinking_terms(CHAT, data)
    assert caught.value.message.startswith(message)
    assert caught.value.param == param


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings", "/detokenize"])
def test_terms_where_no_template_is_applied_are_refused(path: str) -> None:
    with pytest.raises(InvalidRequestError, match="applies no chat template"):
        thinking_terms(path, {"reasoning_effort": "low"})
    assert thinking_terms(path, {"prompt": "q"}) is NO_TERMS


def test_terms_of_completions_may_bound_what_a_prompt_begins() -> None:
    assert said({"thinking_token_budget": 9, "max_tokens": 5}, "/v1/completions")[2] == 9
