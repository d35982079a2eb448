"""The usage that an endpoint tells, and what is no count."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from service.http.token_usage import reasoning_tokens, reply_usage, token_counts


@pytest.mark.parametrize("count", [-5, True, 2**31 + 1, 10**18, 1.5, "7", None, [], {}])
def test_token_counts_takes_no_count_that_cannot_be_one(count: Any) -> None:
    assert token_counts({"prompt_tokens": count, "completion_tokens": 3}) == (None, 3)
    body = orjson.dumps({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
    usage = reply_usage(body)
    assert usage is not None
    assert (usage.prompt_tokens, usage.answer_tokens) == (3, None)


@pytest.mark.parametrize(
    ("details", "tokens"),
    [
        ({"completion_tokens_details": {"reasoning_tokens": 2}}, 2),
        ({"output_tokens_details": {"reasoning_tokens": 0}}, 0),
        ({"completion_tokens_details": {"reasoning_tokens": -1}}, None),
        ({"completion_tokens_details": {}}, None),
        ({"completion_tokens_details": None}, None),
        ({}, None),
    ],
)
def test_reasoning_tokens_are_read_in_the_words_of_each_api(details: Any, tokens: Any) -> None:
    assert reasoning_tokens(details) == tokens
    usage = reply_usage(orjson.dumps({"usage": {"completion_tokens": 3, **details}}))
    assert usage is not None
    assert usage.reasoning_tokens == tokens


@pytest.mark.parametrize(
    ("usage", "prompt"),
    [
        ({"type": "duration", "seconds": 3}, 150),
        ({"type": "duration", "seconds": 0.5}, 25),
        ({"type": "tokens", "input_tokens": 7, "output_tokens": 2, "total_tokens": 9}, 7),
        ({"total_tokens": 9}, 9),
        ({"seconds": -1}, None),
        ({"seconds": True}, None),
        ({"seconds": 1e300}, None),
        ({"seconds": "3"}, None),
    ],
)
def test_usage_of_what_is_only_read_counts_as_the_prompt(
    usage: dict[str, Any], prompt: int | None
) -> None:
    found = reply_usage(orjson.dumps({"text": "x", "usage": usage}))
    assert found is not None
    assert found.prompt_tokens == prompt
