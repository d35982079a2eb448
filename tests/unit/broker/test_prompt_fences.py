"""Texts of others stand between marks that they can't hold."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from service.broker.prompt_fences import MAX_SHOWN_BYTES, filled, mark_for, shown, shown_bytes


@given(st.lists(st.text()), st.integers(0, 9))
def test_mark_for_is_in_no_text(texts: list[str], start: int) -> None:
    numbers = itertools.count(start)
    mark = mark_for(texts, lambda: str(next(numbers)))
    assert not any(mark in text for text in texts)


@given(st.text(), st.integers(1, 100))
def test_shown_is_a_bounded_prefix_of_the_answer(text: str, most: int) -> None:
    cut = shown(text, most)
    assert len(cut.encode()) <= most
    assert cut in text.encode("utf-8", "replace").decode()


def test_shown_leaves_thoughts_out() -> None:
    assert shown("<think>secret</think> 42 ", 100) == "42"


def test_shown_bytes_grow_with_the_bound_of_the_answer() -> None:
    assert shown_bytes(10) == 80
    assert shown_bytes(None) == shown_bytes(10**9) == MAX_SHOWN_BYTES


def test_filled_replaces_only_its_placeholders_and_once() -> None:
    text = filled('{"a": {x}} {y} {x}', {"x": [("T", "{y}{x}")]}, lambda: "m")
    assert text == '{"a": T\n<<m\n{y}{x}\nm>>} {y} T\n<<m\n{y}{x}\nm>>'
