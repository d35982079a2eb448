"""Limits on schemas, patterns and grammars, equal in every field that can carry one."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import Config
from service.config.request_limits import RequestLimits
from service.errors import InvalidRequestError
from service.gateway.request.body_limits import RequestLimitChecker
from service.gateway.request.structured_outputs import StructuredOutputBounds

BOUNDS = StructuredOutputBounds(RequestLimits())
Schema = dict[str, Any]
Put = Callable[[Schema], dict[str, Any]]


def nested(n: int) -> str:
    return "(" * n + "a" + ")?" * n


# Every place of a request that can hold a JSON schema, with the field that an error names.
SCHEMA_PLACES: dict[str, tuple[str, Put]] = {
    "chat": (
        "response_format",
        lambda s: {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}
        },
    ),
    "vllm": ("structured_outputs", lambda s: {"structured_outputs": {"json": s}}),
    "vllm as text": (
        "structured_outputs",
        lambda s: {"structured_outputs": {"json": json.dumps(s)}},
    ),
    "structural tag": (
        "response_format",
        lambda s: {
            "response_format": {
                "type": "structural_tag",
                "structures": [{"begin": "<a>", "schema": s, "end": "</a>"}],
                "triggers": ["<a>"],
            }
        },
    ),
    "structural tag, new form": (
        "response_format",
        lambda s: {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "tag", "content": {"type": "json_schema", "json_schema": s}},
            }
        },
    ),
    "structural tag as text": (
        "structured_outputs",
        lambda s: {
            "structured_outputs": {
                "structural_tag": json.dumps(
                    {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": s}}
                )
            }
        },
    ),
    "tool": (
        "tools",
        lambda s: {"tools": [{"type": "function", "function": {"name": "f", "parameters": s}}]},
    ),
    "tool of Responses": (
        "tools",
        lambda s: {"tools": [{"type": "function", "name": "f", "parameters": s}]},
    ),
    "tool of Messages": ("tools", lambda s: {"tools": [{"name": "f", "input_schema": s}]}),
    "function": ("functions", lambda s: {"functions": [{"name": "f", "parameters": s}]}),
    "Responses": (
        "text",
        lambda s: {"text": {"format": {"type": "json_schema", "name": "x", "schema": s}}},
    ),
    "Messages": (
        "output_config",
        lambda s: {"output_config": {"format": {"type": "json_schema", "schema": s}}},
    ),
    "Messages, before": (
        "output_format",
        lambda s: {"output_format": {"type": "json_schema", "schema": s}},
    ),
    "older vLLM": ("guided_json", lambda s: {"guided_json": s}),
    "older vLLM, as text": ("guided_json", lambda s: {"guided_json": json.dumps(s)}),
}


def deep(levels: int) -> Schema:
    schema: Schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE_SCHEMAS: dict[str, tuple[Schema, str]] = {
    "pattern nested in its text": ({"type": "string", "pattern": nested(200)}, "levels deep"),
    "pattern of 51 KB": ({"type": "string", "pattern": nested(17_000)}, "at most"),
    "pattern too long": ({"type": "string", "pattern": "a|" * 1025}, "2050 bytes"),
    "pattern of a property's name": (
        {"type": "object", "patternProperties": {nested(100): {"type": "string"}}},
        "levels deep",
    ),
    "pattern in a list": ({"anyOf": [{"pattern": nested(65)}]}, "levels deep"),
    "classes nested in a pattern": ({"pattern": "(?:[(]" * 80 + ")" * 80}, "levels deep"),
    "too many properties": (
        {"type": "object", "properties": {f"p{i}": {} for i in range(513)}},
        "properties",
    ),
    "too many definitions": ({"$defs": {f"p{i}": {} for i in range(600)}}, "properties"),
    "properties of properties": (
        {
            "properties": {
                f"p{i}": {"properties": {f"q{j}": {} for j in range(30)}} for i in range(20)
            }
        },
        "properties",
    ),
    "too large": ({"enum": ["x" * 100] * 700}, "bytes"),
    "too deep": (deep(70), "levels deep"),
}


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@pytest.mark.parametrize("kind", HOSTILE_SCHEMAS)
def test_check_hostile_schema_in_any_field_is_refused(place: str, kind: str) -> None:
    param, put = SCHEMA_PLACES[place]
    schema, why = HOSTILE_SCHEMAS[kind]
    with pytest.raises(InvalidRequestError) as refused:
        BOUNDS.check(put(schema))
    assert refused.value.param == param
    assert param in refused.value.message
    assert why in refused.value.message or "bytes" in refused.value.message
    assert "allowed" in refused.value.message


ORDINARY: dict[str, Schema] = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": r"^[A-Z][a-z]+(?: \(née [A-Z][a-z]+\))?$"},
            "pattern": {"type": "string", "description": "a property of that name" * 100},
            "grammar": {"type": "array", "items": {"$ref": "#/$defs/x"}},
        },
        "required": ["name"],
        "$defs": {"x": {"enum": [1, 2.5, None, "(((("]}},
    },
    "as deep as allowed": deep(24),
    "as many properties as allowed": {"properties": {f"p{i}": {} for i in range(512)}},
    "a pattern as nested as allowed": {"pattern": nested(64)},
    "brackets that nest nothing": {"pattern": r"\(" * 200 + "[([{]" * 100},
    "groups beside each other": {"pattern": "(a)" * 300},
}


@pytest.mark.parametrize("place", SCHEMA_PLACES)
@pytest.mark.parametrize("kind", ORDINARY)
def test_check_ordinary_schema_in_any_field_passes(place: str, kind: str) -> None:
    BOUNDS.check(SCHEMA_PLACES[place][1](ORDINARY[kind]))


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": nested(65)}},
        {"structured_outputs": {"regex": "a" * 2049}},
        {"structured_outputs": {"whitespace_pattern": nested(65)}},
        {"structured_outputs": {"grammar": "root ::= " + "(" * 65 + '"a"' + ")" * 65}},
        {"structured_outputs": {"grammar": 'root ::= "a"' + ' | "b"' * 3000}},
        {"structured_outputs": {"choice": ["x" * 64] * 1100}},
        {"structured_outputs": {"structural_tag": "{"}},
        {"structured_outputs": {"json": "[1, "}},
        {"guided_regex": nested(65)},
        {"guided_grammar": "root: " + "(" * 65},
        {"guided_choice": ["x" * 64] * 1100},
        {"response_format": {"type": "structural_tag", "format": {"pattern": nested(65)}}},
        {"response_format": {"type": "structural_tag", "format": {"grammar": "(" * 65}}},
        {"tools": [{"type": "custom", "format": {"definition": "(" * 65, "type": "grammar"}}]},
        {"tools": [{"custom": {"format": {"grammar": {"definition": "(" * 65}}}}]},
        {"tools": [{"type": "function"}] * 513},
        {"functions": [{}] * 513},
        {"tools": [{"x": "y" * 60_000}] * 10},
        {"stop": ["x"] * 65},
        {"bad_words": ["x"] * 257},
        {"bad_words": ["x" * 300] * 256},
        {"logit_bias": {str(i): 1 for i in range(1025)}},
        {"allowed_token_ids": [1] * 65_537},
    ],
    ids=lambda body: str(orjson.dumps(body)[:50]),
)
def test_check_patterns_grammars_and_choices_have_size_limits(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        BOUNDS.check(body)
    assert refused.value.param == next(iter(body))


def test_check_grammar_quotes_and_comments_do_not_count_as_groups() -> None:
    lisp = 'root ::= "(" expr* ")" # (((\nexpr ::= [(] | ' + " ".join(['"("'] * 100)
    BOUNDS.check({"structured_outputs": {"grammar": lisp}})


def test_request_limit_checker_checks_structured_outputs() -> None:
    config = {
        "experts": {"general": {"model": "m"}},
        "pools": {"cpu": {"engine": "simulated"}},
    }
    limits = RequestLimitChecker(Config.model_validate(config))
    with pytest.raises(InvalidRequestError):
        limits.fields({"structured_outputs": {"regex": nested(65)}})


strange = st.recursive(
    st.one_of(st.none(), st.integers(-(2**63), 2**63), st.floats(), st.text(max_size=30)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["pattern", "properties", "json", "grammar", "format", "schema"]),
                st.text(max_size=8),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["response_format", "structured_outputs", "tools", "functions", "text", "guided_json"]
        ),
        strange,
    )
)
def test_check_odd_field_types_raise_typed_errors_only(body: dict[str, Any]) -> None:
    with suppress(InvalidRequestError):
        BOUNDS.check(body)


@pytest.mark.parametrize(
    "before",
    [
        "[']",
        '["]',
        "[#] ",
        '"\\"" ',
        "'\\'' ",
        '/"/ ',
        "/'/ ",
        "a\n# '\n",
        ")" * 150,
        '"[" ',
        "// '\n",
        "\\[ ",
    ],
)
def test_check_no_literal_hides_the_nesting_of_a_grammar(before: str) -> None:
    grammar = "root ::= " + before + "(" * 200 + "\"a\" 'a' " + ")" * 200 + " [']"
    with pytest.raises(InvalidRequestError, match="nested more than"):
        BOUNDS.check({"structured_outputs": {"grammar": grammar}})


def test_check_patterns_in_a_grammar_are_bounded_as_patterns() -> None:
    grammar = "start: /" + "(" * 200 + "a" + ")" * 200 + "/"
    with pytest.raises(InvalidRequestError, match="nested more than"):
        BOUNDS.check({"structured_outputs": {"grammar": grammar}})


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "' + "(" * 200 + '"',
        "root ::= [" + "(" * 200 + "]",
        'start: "a"  # ' + "(" * 200,
        'start: "a"  // ' + "(" * 200,
        "root ::= " + '("a") ' * 500,
    ],
)
def test_check_brackets_that_open_nothing_do_not_count(grammar: str) -> None:
    BOUNDS.check({"structured_outputs": {"grammar": grammar}})
