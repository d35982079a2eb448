"""Defaults of experts in the requests of each endpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import Config
from service.config.expert_request_defaults import DefaultsConfig
from service.gateway.request.expert_defaults import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    FIELDS,
    INPUT_TOKENS,
    MESSAGES,
    NOTHING_ADDED,
    RESPONSES,
    SYSTEM,
    TOKENIZE,
    RequestDefaults,
)
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request.token_limits import within_context
from service.http.prompt_endpoints import TABLE

USER = {"role": "user", "content": "q"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
EVERY = {
    "system": "Be brief.",
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.4,
    "repetition_penalty": 1.1,
    "seed": 7,
    "max_tokens": 50,
    "min_tokens": 3,
    "stop": ["END"],
    "response_format": FORMAT,
    "reasoning_effort": "low",
    "chat_template_kwargs": {"enable_thinking": False},
}
# Prompts that are read only: no default changes how.
READ: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "q"},
    "/v1/rerank": {"query": "q", "documents": ["d"]},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/classify": {"input": "q"},
    "/v1/audio/transcriptions": {"file": "UklGRg=="},
}
PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "q"},
    RESPONSES: {"input": "q"},
    INPUT_TOKENS: {"input": "q"},
    MESSAGES: {"messages": [USER]},
    COUNT_TOKENS: {"messages": [USER]},
    TOKENIZE: {"messages": [USER]},
    **READ,
    "/detokenize": {"tokens": [1]},
}
SAMPLING = {name: EVERY[name] for name in ("temperature", "top_p", "top_k")}
PENALTIES = {
    name: EVERY[name]
    for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
}
THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
WITH_SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, USER]}
FORMS: dict[str, dict[str, Any]] = {
    CHAT: {
        **WITH_SYSTEM,
        **SAMPLING,
        **PENALTIES,
        **THINKING,
        "max_tokens": 50,
        "min_tokens": 3,
        "stop": ["END"],
        "response_format": FORMAT,
        "reasoning_effort": "low",
    },
    COMPLETIONS: {
        "prompt": "q",
        **SAMPLING,
        **PENALTIES,
        "max_tokens": 50,
        "min_tokens": 3,
        "stop": ["END"],
        "response_format": FORMAT,
    },
    RESPONSES: {
        "input": "q",
        "instructions": "Be brief.",
        **SAMPLING,
        **PENALTIES,
        **THINKING,
        "max_output_tokens": 50,
        "stop": ["END"],
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
        "reasoning": {"effort": "low"},
    },
    MESSAGES: {
        "messages": [USER],
        "system": "Be brief.",
        **SAMPLING,
        **THINKING,
        "max_tokens": 50,
        "stop_sequences": ["END"],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"},
    },
    COUNT_TOKENS: {"messages": [USER], "system": "Be brief.", **THINKING},
    TOKENIZE: {**WITH_SYSTEM, **THINKING},
    **READ,
    "/detokenize": {"tokens": [1]},
}
# The body is that of a response, of which only the answer's length does not count.
FORMS[INPUT_TOKENS] = {k: v for k, v in FORMS[RESPONSES].items() if k != "max_output_tokens"}


def config(defaults: dict[str, Any]) -> Config:
    experts = {"base": {"model": "m"}, "v": {"base": "base", "defaults": defaults}}
    return Config.model_validate({"experts": experts, "pools": {"p": {"engine": "simulated"}}})


def request_for(path: str, model: str = "v", **data: Any) -> InferenceRequest:
    raw = orjson.dumps({"model": model, **PROMPTS[path], **data})
    return parse_request(path, raw, {}, 1000)


def applied(path: str, defaults: dict[str, Any], **data: Any) -> dict[str, Any]:
    request = RequestDefaults(config(defaults)).apply(request_for(path, **data), "v")
    return {name: value for name, value in request.data.items() if name != "model"}


def test_forms_cover_every_endpoint_and_default() -> None:
    assert FORMS.keys() == TABLE.keys()
    assert EVERY.keys() == DefaultsConfig.model_fields.keys()
    named = {name for fields in FIELDS.values() for name in fields} | {"system", "max_tokens"}
    assert named == EVERY.keys()


@pytest.mark.parametrize("path", TABLE)
def test_apply_every_default_gives_each_endpoint_its_own_form(path: str) -> None:
    assert applied(path, EVERY) == FORMS[path]


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_apply_leaves_every_field_that_a_request_sets(path: str) -> None:
    other: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.1,
        "top_k": 1,
        "min_p": 0.5,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": 0,
        "max_tokens": 99,
        "max_output_tokens": 98,
        "min_tokens": 0,
        "stop": "x",
        "stop_sequences": ["x"],
        "system": "Mine.",
        "instructions": "Mine.",
        "response_format": {"type": "text"},
        "reasoning_effort": "high",
        "reasoning": {"effort": "high"},
        "text": {"format": {"type": "text"}},
        "output_config": {"format": {"type": "json_schema", "schema": {}}, "effort": "high"},
        "chat_template_kwargs": {"enable_thinking": True},
    }
    given = {name: value for name, value in other.items() if name in FORMS[path]}
    if SYSTEM.get(path) == "messages":
        given["messages"] = [USER, {"role": "developer", "content": "Mine."}]
    assert applied(path, EVERY, **given) == {**PROMPTS[path], **given}


@pytest.mark.parametrize(
    ("path", "data", "unchanged"),
    [
        (CHAT, {"max_completion_tokens": 9}, "max_tokens"),
        (CHAT, {"structured_outputs": {"regex": "a"}}, "response_format"),
        (RESPONSES, {"input": [{"role": "system", "content": "Mine."}]}, "instructions"),
        (MESSAGES, {"thinking": {"type": "disabled"}}, "effort"),
        (TOKENIZE, {"messages": None, "prompt": "q"}, "messages"),
    ],
)
def test_apply_leaves_out_what_a_request_sets_in_another_field(
    path: str, data: dict[str, Any], unchanged: str
) -> None:
    found = applied(path, EVERY, **data)
    assert unchanged not in found
    assert unchanged not in found.get("output_config", {})


@pytest.mark.parametrize(
    ("path", "data", "kwargs"),
    [
        (CHAT, {}, {"enable_thinking": False, "tone": "dry"}),
        (
            CHAT,
            {"chat_template_kwargs": {"x": 1}},
            {"x": 1, "enable_thinking": False, "tone": "dry"},
        ),
        (
            CHAT,
            {"chat_template_kwargs": {"tone": "wet"}},
            {"tone": "wet", "enable_thinking": False},
        ),
        # Who asks for reasoning gets it.
        (CHAT, {"reasoning_effort": "high"}, {"tone": "dry"}),
        (RESPONSES, {"reasoning": {"effort": "high"}}, {"tone": "dry"}),
        (
            MESSAGES,
            {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 4096},
            {"tone": "dry", "enable_thinking": True, "thinking": True},
        ),
    ],
)
def test_apply_merges_arguments_of_the_chat_template(
    path: str, data: dict[str, Any], kwargs: dict[str, Any]
) -> None:
    defaults = {"chat_template_kwargs": {"enable_thinking": False, "tone": "dry"}}
    assert applied(path, defaults, **data)["chat_template_kwargs"] == kwargs


@pytest.mark.parametrize(
    ("path", "data", "least"),
    [
        (CHAT, {}, 20),
        (CHAT, {"max_tokens": 8}, 8),
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": 30}, 20),
        (CHAT, {"min_tokens": 40, "max_tokens": 50}, 40),
    ],
)
def test_apply_keeps_min_tokens_within_the_bound_of_an_answer(
    path: str, data: dict[str, Any], least: int
) -> None:
    assert applied(path, {"min_tokens": 20}, **data)["min_tokens"] == least


def test_at_most_lowers_min_tokens_with_the_bound() -> None:
    request = RequestDefaults(config(EVERY)).apply(request_for(CHAT), "v").at_most(2)
    assert (request.data["max_tokens"], request.data["min_tokens"]) == (2, 2)


def test_apply_default_length_yields_to_the_client_and_not_to_the_gateway() -> None:
    defaults = RequestDefaults(config({"max_tokens": 50}))
    auto = request_for(CHAT, "auto")
    # A budget bounds the answer before an expert is chosen.
    assert defaults.apply(auto.at_most(300), "v").most_tokens == 50
    assert defaults.apply(auto.at_most(20), "v").most_tokens == 20
    given = request_for(CHAT, "auto", max_tokens=400)
    assert defaults.apply(given.at_most(300), "v").most_tokens == 300
    # The context bounds a default, and refuses what the client itself asked for.
    small = within_context(defaults.apply(request_for(CHAT), "v"), "v", 32)
    assert small.most_tokens == 32
    named = defaults.apply(request_for(CHAT, max_tokens=400), "v")
    assert within_context(named, "v", 32).most_tokens == 400


def test_apply_counts_the_system_prompt_in_the_estimate() -> None:
    defaults = RequestDefaults(config({"system": "x" * 4000}))
    before = request_for(CHAT)
    after = defaults.apply(before, "v")
    assert after.most_prompt_tokens == before.most_prompt_tokens + 4000
    assert after.prompt_tokens >= before.prompt_tokens + 1000
    assert defaults.system_bytes(before, "v") == 4000
    assert defaults.system_bytes(after, "v") == defaults.system_bytes(before, "base") == 0
    added = defaults.added(before, ["base", "v"])
    np.testing.assert_array_equal(added.tokens, [0, 1000])
    np.testing.assert_array_equal(added.most_tokens, [0, 4000])
    none = defaults.added(after, ["base", "v"])
    assert not np.any(none.tokens)
    assert not np.any(none.most_tokens)
    assert RequestDefaults(config({"seed": 1})).added(before, ["base", "v"]) == NOTHING_ADDED


def test_apply_without_defaults_keeps_the_body_as_it_came() -> None:
    request = request_for(CHAT)
    assert RequestDefaults(config({"temperature": 1})).apply(request, "base") is request
    assert RequestDefaults(config({})).apply(request, "v") is request
    assert request.raw


VALUES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {}, optional={name: st.just(value) for name, value in EVERY.items()}
)


@given(path=st.sampled_from(list(TABLE)), defaults=VALUES, given_by_client=st.data())
def test_apply_twice_is_apply_once_and_never_changes_what_was_set(
    path: str, defaults: dict[str, Any], given_by_client: st.DataObject
) -> None:
    names = st.sets(st.sampled_from(sorted(FORMS[path])))
    data = {name: FORMS[path][name] for name in given_by_client.draw(names)}
    if data.keys() & {"reasoning_effort", "reasoning"}:
        data.pop("chat_template_kwargs", None)  # they contradict each other
    table = RequestDefaults(config(defaults))
    request = request_for(path, **data)
    once = table.apply(request, "v")
    twice = table.apply(once, "v")
    assert (twice.data, twice.body_bytes, twice.bounded) == (
        once.data,
        once.body_bytes,
        once.bounded,
    )
    for name, value in request.data.items():
        if name == "messages":
            assert once.data[name][-len(value) :] == value
        elif isinstance(value, dict):
            assert value.items() <= once.data[name].items()
        else:
            assert once.data[name] == value
