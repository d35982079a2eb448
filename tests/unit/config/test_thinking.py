"""The section `experts.NAME.thinking`."""

from __future__ import annotations

from typing import Any

import pytest

from service.config import Config
from service.config.loader import parse_config
from service.errors import ConfigError

PARSER = {"p": {"vllm": {"reasoning_parser": "qwen3"}}}


def config(pools: dict[str, Any] | None = None, **experts: Any) -> Config:
    base = {"base": {"model": "m"}}
    return Config.model_validate({"experts": {**base, **experts}, "pools": pools or {"p": {}}})


def test_thinking_may_be_a_switch_or_a_section_and_makes_a_variant() -> None:
    whole = config(
        PARSER,
        fast={"base": "base", "thinking": False},
        think={"base": "base", "thinking": {"budget_tokens": 9}},
    )
    fast, think = whole.experts["fast"], whole.experts["think"]
    assert fast.is_variant
    assert fast.thinking is not None
    assert not fast.thinking.enabled
    assert think.thinking is not None
    assert (think.thinking.enabled, think.thinking.budget_tokens) == (True, 9)
    assert Config.model_validate(whole.model_dump(mode="json")).experts == whole.experts
    schema = Config.model_json_schema()["$defs"]["ExpertConfig"]["properties"]["thinking"]
    assert {"type": "boolean"} in schema["anyOf"]


@pytest.mark.parametrize(
    ("experts", "said"),
    [
        (
            "{model: m, thinking: {budget_tokens: 9}}",
            "experts.e.thinking.budget_tokens: nothing would keep it; set vllm.reasoning_parser",
        ),
        (
            "{remote: {url: 'http://a', model: m}, thinking: {budget_tokens: 9}}",
            "nothing would keep it; set experts.e.remote.thinking_fields to anthropic or vllm",
        ),
        (
            "{model: m, thinking: {enabled: false, budget_tokens: 9}}",
            "experts.e.thinking: budget_tokens is for experts that think",
        ),
        (
            "{model: m, thinking: {budget: 9}}",
            "experts.e.thinking.budget: unknown key; did you mean 'budget_tokens'?",
        ),
        (
            "{model: m, thinking: false, defaults: {chat_template_kwargs: "
            "{enable_thinking: true}}}",
            "defaults.chat_template_kwargs.enable_thinking says true, and thinking says false",
        ),
        (
            "{model: m, thinking: false, defaults: {reasoning_effort: high}}",
            "defaults.reasoning_effort says high, and thinking says false",
        ),
        (
            "{model: m, thinking: true, defaults: {reasoning_effort: none}}",
            "defaults.reasoning_effort says none, and thinking says true",
        ),
        (
            "{model: m, thinking: true, capabilities: [completions]}",
            "experts.e: thinking is for experts with the capability chat",
        ),
    ],
)
def test_thinking_that_can_not_be_is_refused(experts: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(
            f"experts: {{a: {{model: a}}, e: {experts}}}\npools: {{p: {{}}}}\n", "coe.yaml"
        )
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("pools", "bounded"),
    [
        ({"p": {}}, False),
        (PARSER, True),
        ({"p": {"engine": "simulated"}}, True),
        ({"p": {"vllm": {"args": {"reasoning_config": {"reasoning_end_str": "x"}}}}}, True),
        ({**PARSER, "q": {}}, False),
        ({**PARSER, "q": {"experts": ["other"]}}, True),
    ],
)
def test_bounds_thinking_needs_a_parser_in_every_pool(pools: dict[str, Any], bounded: bool) -> None:
    whole = config(pools, other={"model": "n"}, v={"base": "base", "thinking": True})
    assert whole.bounds_thinking("base") is whole.bounds_thinking("v") is bounded


def test_bounds_thinking_of_a_server_by_command_is_unknown() -> None:
    command = {"command": {"run": ["x", "{port}"], "memory_bytes": 1}}
    whole = config(PARSER, far=command, v={"base": "far", "thinking": True})
    assert whole.bounds_thinking("base")
    assert not whole.bounds_thinking("far")
    assert not whole.bounds_thinking("v")
    with pytest.raises(ValueError, match="the server that a command starts may not know"):
        config(PARSER, far={**command, "thinking": {"budget_tokens": 9}})
