"""The forms of stored items: as experts get them, and as clients see them."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.stored_responses.stored_records import (
    StoredItem,
    bodies,
    input_items,
    new_conversation_id,
    new_response_id,
    stored_items,
)

PART = {"type": "input_text", "text": "hi"}


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        (
            {"role": "user", "content": "hi"},
            {"type": "message", "role": "user", "content": [PART], "status": "completed"},
        ),
        (
            {"role": "assistant", "content": "hi"},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "hi", "annotations": []}],
                "status": "completed",
            },
        ),
        (
            {"type": "message", "role": "user", "content": [PART], "status": "incomplete"},
            {"type": "message", "role": "user", "content": [PART], "status": "incomplete"},
        ),
        *(
            (item, item)
            for item in (
                {"type": "reasoning", "summary": [], "encrypted_content": "gAAA=="},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
                {"type": 3},
            )
        ),
    ],
)
def test_item_is_stored_as_it_is_and_shown_in_openai_s_form(
    item: dict[str, Any], shown: dict[str, Any]
) -> None:
    (kept,) = stored_items([item])
    assert orjson.loads(kept.body) == item
    assert kept.to_json() == {**shown, "id": kept.id}


ids = (
    st.none() | st.integers(-9, 9) | st.sampled_from(["msg_1", "msg_2", "", "a b", "ü", "x" * 129])
)


@given(st.lists(ids, max_size=6), st.sets(st.sampled_from(["msg_1", "msg_2"])))
def test_ids_of_stored_items_are_unique_and_kept_where_they_can_be(
    given_ids: list[Any], known: set[str]
) -> None:
    items = [{"role": "user", "content": "hi", "id": name} for name in given_ids]
    kept = stored_items(items, known)
    found = [item.id for item in kept]
    assert len({*found} | known) == len(found) + len(known)
    for name in ("msg_1", "msg_2"):
        assert (name in found) == (name in given_ids and name not in known)
    assert orjson.loads(bodies(kept)) == items
    assert all(item.size == len(item.id) + len(item.body) for item in kept)


def test_input_is_items_whatever_its_form() -> None:
    assert input_items("hi") == [{"role": "user", "content": "hi"}]
    assert input_items([{"role": "user"}, 3, None]) == [{"role": "user"}]
    assert input_items(3) == input_items(None) == []


@pytest.mark.parametrize("make", [new_response_id, new_conversation_id])
def test_new_ids_have_192_random_bits(make: Any) -> None:
    made = {make() for _ in range(100)}
    assert len(made) == 100
    assert {len(name.partition("_")[2]) * 4 for name in made} == {192}


def test_item_without_an_object_s_id_has_the_prefix_of_its_type() -> None:
    kinds = {"message": "msg", "reasoning": "rs", "function_call": "fc", "other": "item"}
    for kind, prefix in kinds.items():
        (kept,) = stored_items([{"type": kind}])
        assert kept.id.startswith(f"{prefix}_")
        assert isinstance(kept, StoredItem)
