"""Other forms of prompts to fit, and scraps."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_models.general.augmentation import LANGUAGES, augment, scraps
from router_models.general.training_prompt_reader import read_training_prompts

texts = st.text(min_size=1, max_size=120)


@settings(deadline=None)
@given(texts, st.sampled_from(sorted(LANGUAGES)), st.integers(0, 1 << 32))
def test_augment_same_draw_gives_the_same_form_and_is_never_empty(
    text: str, language: str, seed: int
) -> None:
    first = augment(text, language, random.Random(seed))
    assert first == augment(text, language, random.Random(seed))
    assert first or not text.strip(" .?!。？！")


@settings(deadline=None)
@given(texts, st.integers(0, 1 << 32))
def test_augment_unknown_language_adds_nothing_polite(text: str, seed: int) -> None:
    assert len(augment(text, "tlh", random.Random(seed))) <= len(text) + 5


def test_augment_changes_most_prompts() -> None:
    draw = random.Random(1)
    prompts = read_training_prompts()[::40]
    changed = sum(augment(p.prompt, p.lang, draw) != p.prompt for p in prompts)
    assert changed > 0.85 * len(prompts)


def test_augment_has_polite_words_in_every_language_of_the_prompts() -> None:
    assert {p.lang for p in read_training_prompts()} == LANGUAGES


@pytest.mark.parametrize("count", [1, 60, 300])
def test_scraps_are_distinct_short_and_as_many_as_asked(count: int) -> None:
    prompts = [p.prompt for p in read_training_prompts()[::20]]
    found = scraps(prompts, count, random.Random(3))
    assert len(found) == len(set(found)) == count
    assert all(text.strip() and len(text) <= 40 for text in found)
    assert not {t.casefold() for t in found} & {p.casefold() for p in prompts}
