"""Terms of a batch, and the plan that keeps the lines as they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.batches.batch_types import AsWritten, BatchLine, BatchTerms, parse_terms
from service.errors import InvalidRequestError
from service.types import NOBODY


@pytest.mark.parametrize(
    ("given", "terms"),
    [
        ({}, BatchTerms(None, 86_400, None)),
        ({"max_cost": 5}, BatchTerms(5.0, 86_400, None)),
        ({"deadline": "90m", "quality": "best"}, BatchTerms(None, 5400, None)),
        ({"deadline": 12.5}, BatchTerms(None, 12.5, None)),
        ({"deadline": "2d", "quality": 1}, BatchTerms(None, 172_800, 1.0)),
        ({"max_cost": None, "quality": None}, BatchTerms()),
    ],
)
@pytest.mark.parametrize("place", ["body", "metadata"])
def test_parse_terms_valid_terms_same_in_both_places(
    given: dict[str, Any], terms: BatchTerms, place: str
) -> None:
    body = {"coe": given} if place == "body" else {"metadata": {"coe": json.dumps(given)}}
    assert parse_terms(body) == terms


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([], "coe"),
        ("best", "coe"),
        ({"budget": 5}, "coe"),
        ({"max_cost": 0}, "coe.max_cost"),
        ({"max_cost": True}, "coe.max_cost"),
        ({"max_cost": "5"}, "coe.max_cost"),
        ({"deadline": "tomorrow"}, "coe.deadline"),
        ({"deadline": "0s"}, "coe.deadline"),
        ({"deadline": "31d"}, "coe.deadline"),
        ({"deadline": None}, "coe.deadline"),
        ({"quality": 0}, "coe.quality"),
        ({"quality": 1.01}, "coe.quality"),
        ({"quality": "good"}, "coe.quality"),
    ],
)
@pytest.mark.parametrize("place", ["body", "metadata"])
def test_parse_terms_invalid_terms_name_the_field(given: Any, param: str, place: str) -> None:
    body = {"coe": given} if place == "body" else {"metadata": {"coe": json.dumps(given)}}
    with pytest.raises(InvalidRequestError) as raised:
        parse_terms(body)
    assert raised.value.param == (param if place == "body" else f"metadata.{param}")


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {"coe": "{"}},
        {"metadata": {"coe": "{}"}, "coe": {}},
    ],
)
def test_parse_terms_unreadable_or_twice_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        parse_terms(body)


async def test_as_written_keeps_models_and_order() -> None:
    lines = [BatchLine(i, f"c{i}", {"model": m}) for i, m in enumerate(["b", "a", "auto"])]
    plan = await AsWritten().plan("/v1/embeddings", lines, BatchTerms(), NOBODY)
    assert [(c.line, c.model) for c in plan.choices] == [(0, "b"), (1, "a"), (2, "auto")]
