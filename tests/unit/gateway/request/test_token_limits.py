"""The size of a request, and the answer length that `max_cost` allows."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.broker.cost_model import CostModel
from service.broker.token_prices import Price
from service.config.request_limits import RequestLimits
from service.errors import InvalidRequestError
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request.token_limits import check_extent, within_context, within_cost

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
MARKET = CostModel(("a", "b"), (), {"a": Price(0, 10), "b": Price(0, 90)})


def request_for(path: str, **data: Any) -> InferenceRequest:
    return parse_request(path, orjson.dumps(data), {}, 1000)


@pytest.mark.parametrize(
    ("path", "data", "prompts", "answers"),
    [
        (CHAT, {"messages": HELLO}, 1, 1),
        (CHAT, {"messages": HELLO, "n": 3}, 1, 3),
        (TEXT, {"prompt": "x", "n": 2, "best_of": 5}, 1, 5),
        (TEXT, {"prompt": ["x", "y"], "n": 2}, 2, 4),
        (TEXT, {"prompt": [1, 2, 3]}, 1, 1),
        (TEXT, {"prompt": [[1], [2, 3]], "n": 0}, 2, 2),
        (VECTORS, {"input": ["x"] * 7}, 7, 7),
        (VECTORS, {"input": "x"}, 1, 1),
        ("/v1/responses", {"input": HELLO * 3}, 1, 1),
    ],
)
def test_prompts_and_answers_are_counted_for_each_endpoint(
    path: str, data: dict[str, Any], prompts: int, answers: int
) -> None:
    given = request_for(path, **data)
    assert (given.prompts, given.answers) == (prompts, answers)


@pytest.mark.parametrize(
    ("more", "experts", "tokens"),
    [
        ({}, ("a",), 100),
        ({}, ("b",), 11),
        ({}, ("a", "b"), 10),
        ({"n": 4}, ("a",), 25),
        ({"max_tokens": 7}, ("a",), 7),
    ],
)
def test_within_cost_limits_max_tokens_to_what_max_cost_buys(
    more: dict[str, Any], experts: tuple[str, ...], tokens: int
) -> None:
    given = request_for(CHAT, messages=HELLO, coe={"max_cost": 1000e-6}, **more)
    assert within_cost(given, experts, MARKET).most_tokens == tokens


@pytest.mark.parametrize(
    ("path", "body", "field", "tokens"),
    [
        (CHAT, {"messages": HELLO}, "max_tokens", 100),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 999}, "max_completion_tokens", 100),
        (CHAT, {"messages": HELLO, "max_output_tokens": 1}, "max_tokens", 100),
        (CHAT, {"messages": HELLO, "max_tokens": None, "max_output_tokens": 1}, "max_tokens", 100),
        ("/v1/responses", {"input": "x", "max_tokens": 7}, "max_output_tokens", 100),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 999}, "max_tokens", 100),
        (TEXT, {"prompt": "x"}, "max_tokens", None),
        (TEXT, {"prompt": "x", "max_tokens": 999}, "max_tokens", 100),
    ],
)
def test_within_cost_sets_the_field_that_the_endpoint_s_engine_reads(
    path: str, body: dict[str, Any], field: str, tokens: int | None
) -> None:
    given = request_for(path, **body, coe={"max_cost": 1000e-6})
    assert within_cost(given, ("a",), MARKET).data.get(field) == tokens


def test_within_cost_two_length_fields_are_both_limited_and_never_raised() -> None:
    given = request_for(
        CHAT,
        messages=HELLO,
        max_tokens=100_000,
        max_completion_tokens=5000,
        coe={"max_cost": 1000e-6},
    )
    bounded = within_cost(given, ("a",), MARKET)
    assert (bounded.data["max_tokens"], bounded.data["max_completion_tokens"]) == (100, 100)
    assert within_cost(bounded, ("a",), MARKET) is bounded


@pytest.mark.parametrize(("context", "tokens"), [(2048, 2048), (0, 6639), (131_072, 6639)])
def test_within_cost_generous_max_cost_stays_within_the_context(context: int, tokens: int) -> None:
    market = CostModel(("a",), (), {"a": Price(0, 1.5)})
    given = request_for(CHAT, messages=HELLO, coe={"max_cost": 6639 * 1.5e-6})
    got = within_cost(given, ("a",), market, (context,))
    # Where the context is smaller, nothing has to be said at all.
    assert got.given_tokens == (None if context == 2048 else tokens)
    two = CostModel(("a", "b"), (), {"a": Price(0, 1.5), "b": Price(0, 0)})
    got = within_cost(given, ("a", "b"), two, (context, 100_000))
    assert got.given_tokens == min(tokens, context or 100_000)


@pytest.mark.parametrize(
    ("model", "context", "clipped"),
    [("auto", 2048, 2048), ("auto:fast", 2048, 2048), ("a", 2048, None), ("auto", 0, None)],
)
def test_within_context_clips_max_tokens_for_auto_and_not_for_a_named_expert(
    model: str, context: int, clipped: int | None
) -> None:
    given = request_for(CHAT, model=model, messages=HELLO, max_completion_tokens=64_000)
    got = within_context(given, "a", context)
    assert got.clipped == clipped
    assert got.data["max_completion_tokens"] == (clipped or 64_000)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"messages": HELLO, "n": 129}, "`n` must be at most 128"),
        (TEXT, {"prompt": "x", "best_of": 129}, "`best_of` must be at most 128"),
        ("/v1/responses", {"input": "x", "n": 129}, "`n` must be at most 128"),
        (TEXT, {"prompt": ["x"] * 65}, "65 prompts; at most 64"),
        (TEXT, {"prompt": [[1]] * 65}, "65 prompts; at most 64"),
        (TEXT, {"prompt": ["x"] * 64, "n": 3}, "192 answers; at most 128"),
        (VECTORS, {"input": ["x"] * 1025}, "1025 prompts; at most 1024"),
    ],
)
def test_check_extent_request_above_the_limits_raises(
    path: str, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        check_extent(request_for(path, **body), RequestLimits())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO, "n": 128}),
        (TEXT, {"prompt": ["x"] * 64, "n": 2}),
        (TEXT, {"prompt": list(range(5000))}),
        (VECTORS, {"input": ["x"] * 1024}),
        ("/v1/responses", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ],
)
def test_check_extent_request_at_the_limits_passes(path: str, body: dict[str, Any]) -> None:
    check_extent(request_for(path, **body), RequestLimits())


def test_within_cost_of_embeddings_changes_nothing() -> None:
    given = request_for(VECTORS, input="x", coe={"max_cost": 1000e-6})
    assert within_cost(given, ("a",), MARKET) is given


def test_within_cost_below_one_token_raises() -> None:
    given = request_for(CHAT, messages=HELLO, coe={"max_cost": 9e-6})
    with pytest.raises(InvalidRequestError, match="may cost more than 9e-06 with a"):
        within_cost(given, ("a",), MARKET)
