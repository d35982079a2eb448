"""Fills the templates of recipes with texts of others, each of them fenced. Pure.

A text that another model wrote is data. It stands between `<<MARK` and `MARK>>`, where the mark is
drawn at random for every call, and it never holds the mark. So no answer can close its own fence
and speak as if it were the prompt. Texts are filled in once: placeholders inside them stay text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from service.broker.answer_agreement import after_thinking
from service.config.recipe_prompts import MARK, PLACEHOLDER

MAX_SHOWN_BYTES = 16_000
"""Most bytes of an answer that are shown to another expert."""
_BYTES_PER_TOKEN = 8

NewMark = Callable[[], str]


def shown_bytes(most_tokens: int | None) -> int:
    """Most bytes of one answer that others see, for an answer of at most this many tokens."""
    if most_tokens is None:
        return MAX_SHOWN_BYTES
    return min(MAX_SHOWN_BYTES, max(1, _BYTES_PER_TOKEN * most_tokens))


def shown(answer: str, most_bytes: int) -> str:
    """The part of an answer that others see: without thoughts, and of bounded length."""
    text = after_thinking(answer).strip().encode("utf-8", "replace")[:most_bytes]
    return text.decode("utf-8", "ignore")


def mark_for(texts: Iterable[str], new_mark: NewMark) -> str:
    """Draw a mark that none of these texts holds.

    Args:
        texts: The texts between the marks.
        new_mark: Draws a mark at random; it is asked again while a text holds the mark.
    """
    held = list(texts)
    while True:
        mark = new_mark()
        if not any(mark in text for text in held):
            return mark


def fenced(parts: Sequence[tuple[str, str]], mark: str) -> str:
    """Write texts with their titles, each of them between the marks."""
    return "\n\n".join(f"{title}\n<<{mark}\n{text}\n{mark}>>" for title, text in parts)


def filled(
    template: str, fields: Mapping[str, Sequence[tuple[str, str]]], new_mark: NewMark
) -> str:
    """Fill a template.

    Args:
        template: A text with the placeholders of `fields`, and of the mark.
        fields: For each placeholder its texts with their titles.
        new_mark: Draws a mark at random.
    """
    mark = mark_for((text for parts in fields.values() for _, text in parts), new_mark)
    values = {name: fenced(parts, mark) for name, parts in fields.items()} | {MARK: mark}
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), template)
