"""How much a request may come to, and how short its answers have to be for a bound on cost."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.api.body import Asked, read_asked
from service.api.extent import answers_of, prompts_of, within
from service.broker.market import Market
from service.broker.price import Price
from service.errors import InvalidRequest

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
MARKET = Market(("a", "b"), (), {"a": Price(0, 10), "b": Price(0, 90)})


def asked(path: str, **data: Any) -> Asked:
    return read_asked(path, orjson.dumps(data), {}, 1000)


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
def test_prompts_and_answers(path: str, data: dict[str, Any], prompts: int, answers: int) -> None:
    given = asked(path, **data)
    assert (prompts_of(given), answers_of(given)) == (prompts, answers)


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
def test_answers_are_as_short_as_a_bound_on_cost_asks(
    more: dict[str, Any], experts: tuple[str, ...], tokens: int
) -> None:
    given = asked(CHAT, messages=HELLO, coe={"max_cost": 1000e-6}, **more)
    assert within(given, experts, MARKET).most_tokens == tokens


def test_what_has_no_answer_s_length_is_given_none() -> None:
    given = asked(VECTORS, input="x", coe={"max_cost": 1000e-6})
    assert within(given, ("a",), MARKET) is given


def test_a_bound_below_one_token_is_refused() -> None:
    given = asked(CHAT, messages=HELLO, coe={"max_cost": 9e-6})
    with pytest.raises(InvalidRequest, match="may cost more than 9e-06 with a"):
        within(given, ("a",), MARKET)
