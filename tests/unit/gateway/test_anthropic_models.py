"""Anthropic's list of models: its form, and its pages."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import ModelInfo

from service.errors import InvalidRequestError
from service.gateway.anthropic_models import model_of, page_of


def entry(name: str, *capabilities: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "created": 1e9, "coe": {"capabilities": capabilities}, **more}


ENTRIES = [
    entry("auto", "chat"),
    *(entry(f"e{i}", "chat", "tools") for i in range(1, 5)),
    entry("vectors", "embeddings"),
]


def test_model_has_anthropic_s_form() -> None:
    found = ModelInfo.model_validate(model_of(entry("e", "chat", max_model_len=64)), strict=False)
    assert (found.id, found.type, found.display_name) == ("e", "model", "e")
    assert found.created_at.timestamp() == 1e9
    assert found.max_input_tokens == 64


@pytest.mark.parametrize(
    ("query", "names", "more"),
    [
        ({}, ["auto", "e1", "e2", "e3", "e4"], False),
        ({"limit": "2"}, ["auto", "e1"], True),
        ({"limit": "2", "after_id": "e1"}, ["e2", "e3"], True),
        ({"limit": "2", "after_id": "e2"}, ["e3", "e4"], False),
        ({"after_id": "e4"}, [], False),
        ({"limit": "2", "before_id": "e3"}, ["e1", "e2"], True),
        ({"limit": "2", "before_id": "e2"}, ["auto", "e1"], False),
        ({"lifecycle": "active"}, ["auto", "e1", "e2", "e3", "e4"], False),
        ({"lifecycle[]": "retired"}, [], False),
    ],
)
def test_page_is_the_part_that_was_asked_for(
    query: dict[str, str], names: list[str], more: bool
) -> None:
    page = page_of(ENTRIES, query)
    assert [model["id"] for model in page["data"]] == names
    assert page["has_more"] is more
    assert (page["first_id"], page["last_id"]) == ((names[0], names[-1]) if names else (None, None))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *(({"limit": limit}, "limit") for limit in ("0", "1001", "x", "-1", "9" * 9)),
        ({"after_id": "vectors"}, "after_id"),
        ({"before_id": "nobody"}, "before_id"),
        ({"before_id": "e1", "after_id": "e2"}, "after_id"),
        ({"lifecycle": "new"}, "lifecycle"),
    ],
)
def test_page_parameters_that_are_not_valid_are_refused(query: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        page_of(ENTRIES, query)
    assert caught.value.param == param
