"""Every way to ask for thinking at every kind of expert: one clear result or one clear error."""

from __future__ import annotations

from itertools import product
from typing import Any

import orjson
import pytest

from service.config import Config
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request.thinking_ways import ThinkingWays

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "q"}]},
    RESPONSES: {"input": "q"},
    MESSAGES: {"messages": [{"role": "user", "content": "q"}], "max_tokens": 8192},
}
# Each form that clients have, by what it asks for.
FORMS: dict[str, list[dict[str, Any]]] = {
    "off": [
        {"reasoning_effort": "none"},
        {"reasoning": {"effort": "none"}},
        {"thinking": {"type": "disabled"}},
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
        {"thinking_token_budget": 0},
    ],
    "on": [
        {"thinking": {"type": "enabled"}},
        {"enable_thinking": True},
        {"chat_template_kwargs": {"thinking": True}},
    ],
    "low": [{"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}],
    "2000": [{"thinking": {"type": "enabled", "budget_tokens": 2000}}],
}
KINDS: dict[str, dict[str, Any]] = {
    "parsed": {"model": "m"},
    "unparsed": {"model": "n"},
    "command": {"command": {"run": ["x", "{port}"], "memory_bytes": 1}},
    "openai": {"remote": {"url": "http://a", "model": "x"}},
    "anthropic": {"remote": {"url": "http://b", "model": "x", "thinking_fields": "anthropic"}},
    "vllm": {"remote": {"url": "http://c", "model": "x", "thinking_fields": "vllm"}},
}
REMOTE = ", and its endpoint takes no budget of thinking here"
# What an expert of each kind is told, or why it can't be asked, where its config says nothing.
SWITCHES = {"enable_thinking": True, "thinking": True}
NO_PARSER = "can't bound its thinking: its pools have no vllm.reasoning_parser"
BY_COMMAND = "can't bound its thinking: a command starts its server"
OFF = {"thinking": {"type": "disabled"}}
ADAPTIVE = {"thinking": {"type": "adaptive"}}
ENABLED = {"thinking": {"type": "enabled", "budget_tokens": 2000}}
TOLD: dict[tuple[str, str], dict[str, dict[str, Any] | str]] = {
    (kind, path): {
        "off": off,
        "on": {"chat_template_kwargs": SWITCHES},
        "low": low,
        "2000": {"chat_template_kwargs": SWITCHES, "thinking_token_budget": 2000},
    }
    for kind in ("parsed", "unparsed", "command", "vllm")
    for path, off, low in (
        (CHAT, {"reasoning_effort": "none"}, {"reasoning_effort": "low"}),
        (RESPONSES, {"reasoning": {"effort": "none"}}, {"reasoning": {"effort": "low"}}),
        (MESSAGES, OFF, {"output_config": {"effort": "low"}}),
    )
}
for where in (CHAT, RESPONSES, MESSAGES):
    TOLD["unparsed", where] = {**TOLD["unparsed", where], "2000": NO_PARSER}
    TOLD["command", where] = {**TOLD["command", where], "2000": BY_COMMAND}
TOLD["vllm", RESPONSES]["2000"] = "is remote" + REMOTE
TOLD["openai", CHAT] = {
    "off": {"reasoning_effort": "none"},
    "on": {"reasoning_effort": "medium"},
    "low": {"reasoning_effort": "low"},
    "2000": "is remote" + REMOTE,
}
TOLD["openai", RESPONSES] = TOLD["anthropic", RESPONSES] = {
    "off": {"reasoning": {"effort": "none"}},
    "on": {"reasoning": {"effort": "medium"}},
    "low": {"reasoning": {"effort": "low"}},
    "2000": "is remote" + REMOTE,
}
TOLD["anthropic", CHAT] = {
    "off": OFF,
    "on": "is remote, and thinks only with a budget",
    "low": "is remote, and thinks only with a budget",
    "2000": ENABLED,
}
for kind in ("openai", "anthropic", "vllm"):
    TOLD[kind, MESSAGES] = {
        "off": OFF,
        "on": ADAPTIVE,
        "low": {**ADAPTIVE, "output_config": {"effort": "low"}},
        "2000": ENABLED,
    }


def config(**more: Any) -> Config:
    experts = {name: {**kind, **more} for name, kind in KINDS.items()}
    pools = {
        "a": {
            "engine": "vllm",
            "experts": ["parsed", "command"],
            "vllm": {"reasoning_parser": "qwen3"},
        },
        "b": {"engine": "vllm", "experts": ["unparsed"]},
    }
    return Config.model_validate({"experts": experts, "pools": pools})


def request_for(path: str, **data: Any) -> InferenceRequest:
    raw = orjson.dumps({"model": "auto", **PROMPTS[path], **data})
    return parse_request(path, raw, {}, 1000)


def has_template(kind: str, path: str) -> bool:
    """Whether the chat template gets arguments."""
    return kind in ("parsed", "unparsed", "command") or (kind == "vllm" and path != MESSAGES)


def outcome(config: Config, expert: str, request: InferenceRequest) -> dict[str, Any] | str:
    """What the expert is told of thinking, or why it can't be asked."""
    reasons = ThinkingWays(config).refusals(request.endpoint, request.thinking)
    if (why := reasons.get(expert)) is not None:
        return why
    table = RequestDefaults(config)
    once = table.apply(request, expert)
    assert table.apply(once, expert).data == once.data
    return {n: v for n, v in once.data.items() if n not in {"model", *PROMPTS[request.endpoint]}}


@pytest.mark.parametrize(("kind", "path"), [*product(KINDS, PROMPTS)])
def test_every_form_at_every_kind_of_expert_has_one_result(kind: str, path: str) -> None:
    whole = config()
    for meant, forms in FORMS.items():
        for form in forms:
            told = TOLD[kind, path][meant]
            if "chat_template_kwargs" in form and has_template(kind, path):
                # Arguments of a template stay as they are given.
                assert isinstance(told, dict)
                told = {**told, **form}
            assert outcome(whole, kind, request_for(path, **form)) == told, form


@pytest.mark.parametrize(("kind", "path"), [*product(KINDS, PROMPTS)])
def test_declared_ways_answer_only_what_asks_for_them(kind: str, path: str) -> None:
    fast, think = config(thinking=False), config(thinking=True)
    for meant, forms in FORMS.items():
        for form in forms:
            request = request_for(path, **form)
            fast_says, think_says = outcome(fast, kind, request), outcome(think, kind, request)
            if meant == "off":
                assert isinstance(fast_says, dict)
                assert think_says == "always thinks"
            else:
                assert fast_says == "never thinks"
                assert think_says != "never thinks"


@pytest.mark.parametrize(("kind", "path"), [*product(KINDS, PROMPTS)])
@pytest.mark.parametrize("enabled", [False, True])
def test_declared_way_is_told_where_a_request_says_nothing(
    kind: str, path: str, enabled: bool
) -> None:
    told = outcome(config(thinking=enabled), kind, request_for(path))
    if has_template(kind, path):
        assert told == {"chat_template_kwargs": dict.fromkeys(SWITCHES, enabled)}
    elif path == MESSAGES or (kind, path) == ("anthropic", CHAT):
        assert told == (ADAPTIVE if enabled else OFF)
    else:
        assert told == {}


@pytest.mark.parametrize(
    ("effort", "bound", "budget"),
    [
        (None, None, 800),
        ("minimal", None, 100),
        ("low", None, 200),
        ("medium", None, 400),
        ("high", None, 800),
        ("max", None, 800),
        (None, 400, 300),
        ("low", 100, 75),
        (None, 1, 1),
    ],
)
def test_own_budget_is_parted_by_effort_and_leaves_room_for_the_answer(
    effort: str | None, bound: int | None, budget: int
) -> None:
    whole = Config.model_validate(
        {
            "experts": {"e": {"model": "m", "thinking": {"budget_tokens": 800}}},
            "pools": {"p": {"vllm": {"reasoning_parser": "qwen3"}}},
        }
    )
    data = {"reasoning_effort": effort, "max_tokens": bound}
    told = RequestDefaults(whole).apply(request_for(CHAT, **data), "e")
    assert told.data["thinking_token_budget"] == told.thinking_budget == budget


@pytest.mark.parametrize("own", [1, 500, 2000, 8000])
@pytest.mark.parametrize("effort", [None, "minimal", "low", "max"])
@pytest.mark.parametrize("given", [None, 1024, 3000])
@pytest.mark.parametrize("bound", [None, 600, 1024, 1025, 1500, 4000, 30_000])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_anthropic_endpoint_gets_no_budget_that_it_refuses(
    own: int, effort: str | None, given: int | None, bound: int | None, path: str
) -> None:
    remote = {"url": "http://b", "model": "x", "thinking_fields": "anthropic"}
    expert = {"remote": remote, "thinking": {"budget_tokens": own}}
    whole = Config.model_validate({"experts": {"e": expert}})
    data: dict[str, Any] = {} if effort is None else {"output_config": {"effort": effort}}
    if given is not None:
        data["thinking"] = {"type": "enabled", "budget_tokens": given}
    asked = request_for(path, **data)
    if bound is not None:
        # As a bound of the cost lowers it.
        asked = asked.at_most(bound)
    told = RequestDefaults(whole).apply(asked, "e")
    thinking = told.data["thinking"]
    if thinking["type"] == "disabled":
        assert told.thinking_budget is None
        assert bound is not None
        assert bound <= 1024 or (given is not None and bound <= given)
        return
    assert thinking["budget_tokens"] == told.thinking_budget
    assert thinking["budget_tokens"] >= 1024
    assert told.most_tokens is None or thinking["budget_tokens"] < told.most_tokens
    assert given is None or thinking["budget_tokens"] <= given


def test_clients_budget_and_the_configs_the_smaller_counts() -> None:
    whole = Config.model_validate(
        {
            "experts": {"e": {"model": "m", "thinking": {"budget_tokens": 800}}},
            "pools": {"p": {"vllm": {"reasoning_parser": "qwen3"}}},
        }
    )
    for given, kept in ((100, 100), (2000, 800)):
        request = request_for(CHAT, thinking_token_budget=given)
        assert RequestDefaults(whole).apply(request, "e").thinking_budget == kept


def test_request_that_says_nothing_stays_as_it_is() -> None:
    for path in PROMPTS:
        request = request_for(path)
        for kind in KINDS:
            assert RequestDefaults(config()).apply(request, kind) is request


@pytest.mark.parametrize(
    ("most", "thinking"),
    [
        (8000, {"type": "enabled", "budget_tokens": 4000}),
        (4000, {"type": "enabled", "budget_tokens": 3999}),
        (1025, {"type": "enabled", "budget_tokens": 1024}),
        (1024, {"type": "disabled"}),
        (1, {"type": "disabled"}),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_bound_that_a_budget_lowers_still_fits_the_thinking(
    most: int, thinking: dict[str, Any], before: bool
) -> None:
    """The gateway's own bounds come before an expert is chosen, and after."""
    defaults = RequestDefaults(config())
    request = request_for(MESSAGES, thinking={"type": "enabled", "budget_tokens": 4000})
    if before:
        told = defaults.apply(request.at_most(most), "anthropic")
    else:
        told = defaults.apply(request, "anthropic").at_most(most)
    assert told.data["thinking"] == thinking
    assert told.data["max_tokens"] == most
