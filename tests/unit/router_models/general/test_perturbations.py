"""Perturbations: what each kind may change, the same for the same seed, and enough pairs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_models.general.held_out_prompts import (
    HeldOutPrompt,
    Paraphrase,
    held_out_prompts,
    paraphrases,
)
from router_models.general.perturbations import (
    KINDS,
    PARAPHRASE,
    perturb,
    perturbed_pairs,
)

LANGUAGES = st.sampled_from(["de", "en", "es", "fr", "it", "ja", "pt", "zh"])
SEEDS = st.integers(0, 2**32)


def distance(a: str, b: str) -> int:
    """The Levenshtein distance of two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (x != y)))
    return row[-1]


@given(st.text(), st.sampled_from(sorted(KINDS)), LANGUAGES, SEEDS)
def test_perturb_gives_another_text_or_none_and_the_same_again(
    text: str, kind: str, language: str, seed: int
) -> None:
    form = perturb(text, kind, language, seed)
    assert form is None or form != text
    assert perturb(text, kind, language, seed) == form


@given(st.text(alphabet="abcdefghij klmno", max_size=150), SEEDS)
def test_perturb_typo_changes_at_most_one_letter_in_40_and_keeps_beginnings(
    text: str, seed: int
) -> None:
    form = perturb(text, "typo", "en", seed)
    if form is None:
        assert all(len(word) < 4 for word in text.split(" "))
        return
    assert 1 <= distance(text, form) <= min(4, 1 + len(text) // 40)
    words, changed = text.split(" "), form.split(" ")
    assert [word[:1] for word in words] == [word[:1] for word in changed]
    assert all(a == b for a, b in zip(words, changed, strict=True) if len(a) < 4)


@given(st.text(alphabet="abcABC éß? "), SEEDS)
def test_perturb_case_keeps_the_letters(text: str, seed: int) -> None:
    form = perturb(text, "case", "en", seed)
    assert form is None or form.casefold() == text.casefold()


@given(st.text(), SEEDS)
def test_perturb_space_keeps_everything_else(text: str, seed: int) -> None:
    form = perturb(text, "space", "en", seed)
    assert form is not None
    assert form.split() == text.split()
    assert form[-1].isspace()


@given(st.text(), LANGUAGES, SEEDS)
def test_perturb_politeness_adds_to_one_side(text: str, language: str, seed: int) -> None:
    form = perturb(text, "politeness", language, seed)
    assert form is not None
    assert form.startswith(text) or form.endswith(text)


@given(st.text(), SEEDS)
def test_perturb_ending_changes_only_the_last_marks(text: str, seed: int) -> None:
    form = perturb(text, "ending", "en", seed)
    assert form is not None
    assert form.rstrip(".?!。？！") == text.rstrip(".?!。？！")


def test_perturb_chinese_has_no_case_and_no_mistyped_letters() -> None:
    assert perturb("世界上面积最大的国家是哪个？", "case", "zh", 0) is None
    assert perturb("世界上面积最大的国家是哪个？", "typo", "zh", 0) is None


@pytest.mark.parametrize(
    ("kind", "language", "message"),
    [("rhyme", "en", "known: typo, case"), ("case", "xx", "known: de, en")],
)
def test_perturb_unknown_kind_or_language_names_the_known(
    kind: str, language: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        perturb("Hello", kind, language, 0)


def test_perturbed_pairs_of_the_held_out_prompts_are_400_of_each_kind_some() -> None:
    pairs = perturbed_pairs(held_out_prompts(), paraphrases(), seed=0)
    kinds = Counter(pair.kind for pair in pairs)
    assert len(pairs) >= 400
    assert kinds.keys() == {PARAPHRASE, *KINDS}
    assert min(kinds.values()) >= 100
    assert all(pair.prompt != pair.original.prompt for pair in pairs)
    assert pairs == perturbed_pairs(held_out_prompts(), paraphrases(), seed=0)
    assert pairs != perturbed_pairs(held_out_prompts(), paraphrases(), seed=1)


def test_perturbed_pairs_paraphrase_of_unknown_prompt_is_named() -> None:
    prompt = HeldOutPrompt("a", "Hello there", "small-talk", "en")
    with pytest.raises(ValueError, match="'b'"):
        perturbed_pairs([prompt], [Paraphrase("b", "Hi there")], seed=0)
