"""The shipped prompts, and what is refused in a file of prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from router_models.general.categories import general_categories
from router_models.general.near_duplicates import (
    MOST_ALIKE,
    MOST_LIKE_HELD_OUT,
    alikeness,
    cosines,
    held_out_texts,
)
from router_models.general.training_prompt_reader import (
    PromptsError,
    TrainingPrompt,
    normalised_text,
    read_training_prompts,
    read_unknown,
)

# The fewest prompts of each category, by language.
LEAST = {"en": 60, "zh": 25, "hi": 7, "pt": 6} | dict.fromkeys(("de", "fr", "es", "it", "ja"), 10)
LEAST |= dict.fromkeys(("nl", "pl", "ru"), 5) | {"ar": 4}
GOOD = {"prompt": "Is it legal?", "category": "law", "lang": "en"}


@pytest.fixture(scope="module")
def shipped() -> tuple[TrainingPrompt, ...]:
    return read_training_prompts()


def test_shipped_prompts_have_enough_of_each_category_in_each_language(
    shipped: tuple[TrainingPrompt, ...],
) -> None:
    counts = Counter((row.lang, row.category) for row in shipped)
    assert {row.lang for row in shipped} == set(LEAST)
    short = {
        (lang, name): counts[lang, name]
        for lang, least in LEAST.items()
        for name in general_categories().names
        if counts[lang, name] < least
    }
    assert short == {}


@pytest.mark.parametrize("lang", sorted(LEAST))
def test_shipped_prompts_have_no_near_duplicates(
    shipped: tuple[TrainingPrompt, ...], lang: str
) -> None:
    texts = [row.prompt for row in shipped if row.lang == lang]
    alike = alikeness(texts)
    found = [(texts[i], texts[j]) for i, j in np.argwhere(np.triu(alike, 1) > MOST_ALIKE)]
    assert found == []


@pytest.mark.parametrize("lang", sorted(LEAST))
def test_shipped_prompts_are_not_near_held_out_prompts(
    shipped: tuple[TrainingPrompt, ...], lang: str
) -> None:
    taught = [row.prompt for row in (*shipped, *read_unknown()) if row.lang == lang]
    held_out = held_out_texts(lang)
    near = np.argwhere(cosines(taught, held_out) > MOST_LIKE_HELD_OUT)
    assert [(taught[i], held_out[j]) for i, j in near] == []


def test_unknown_texts_are_in_every_language_and_taught_in_no_category(
    shipped: tuple[TrainingPrompt, ...],
) -> None:
    unknown = read_unknown()
    assert min(Counter(row.lang for row in unknown)[lang] for lang in LEAST) >= 15
    assert {row.category for row in unknown} == {general_categories().fallback}
    taught = {normalised_text(row.prompt) for row in shipped}
    assert not taught & {normalised_text(row.prompt) for row in unknown}


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("SELECT all users older than 30 in SQL", "shell-sql"),
        ("regex to match an email", "coding"),
        ("def fib(n):", "coding"),
        ("Is it legal to record a phone call in Germany?", "law"),
        ("Give me a recipe for lasagna", "everyday-advice"),
    ],
)
def test_prompts_that_routers_got_wrong_are_taught(
    shipped: tuple[TrainingPrompt, ...], prompt: str, category: str
) -> None:
    assert TrainingPrompt(prompt, category, "en") in shipped


def _write(folder: Path, *lines: object, lang: str = "en") -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / f"{lang}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_read_training_prompts_good_rows_are_read_by_language(tmp_path: Path) -> None:
    _write(tmp_path, GOOD, "", GOOD | {"prompt": "1 + 1\u2028?", "category": "coding"})
    _write(tmp_path, GOOD | {"prompt": "Ist das erlaubt?", "lang": "de"}, lang="de")
    assert read_training_prompts(tmp_path) == (
        TrainingPrompt("Ist das erlaubt?", "law", "de"),
        TrainingPrompt("Is it legal?", "law", "en"),
        TrainingPrompt("1 + 1\u2028?", "coding", "en"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not a line of JSON"),
        ([1], "must have the keys prompt, category, lang"),
        ({"prompt": "x", "category": "law"}, "must have the keys"),
        (GOOD | {"id": 3}, "must have the keys"),
        (GOOD | {"prompt": ""}, "'prompt' must be a text that is not empty"),
        (GOOD | {"prompt": " \n"}, "'prompt' must be a text that is not empty"),
        (GOOD | {"prompt": 7}, "'prompt' must be a text"),
        (GOOD | {"category": "laws"}, "unknown category 'laws'; allowed are coding, "),
        (GOOD | {"category": "general"}, "unknown category 'general'"),
        (GOOD | {"lang": "de"}, "'lang' is 'de', but the file is for 'en'"),
    ],
)
def test_read_training_prompts_bad_row_is_refused_with_file_and_line(
    tmp_path: Path, row: object, message: str
) -> None:
    _write(tmp_path, GOOD | {"prompt": "May I?"}, "", row)
    with pytest.raises(PromptsError, match=message) as caught:
        read_training_prompts(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'en.jsonl'}:3: ")


@pytest.mark.parametrize(
    "again",
    ["Is it legal?", "is it LEGAL", "  Is  it\nlegal . ", "Ｉｓ it legal?"],
)
@pytest.mark.parametrize("category", ["law", "coding"])
def test_read_training_prompts_same_text_again_is_refused_with_both_places(
    tmp_path: Path, again: str, category: str
) -> None:
    _write(tmp_path, GOOD | {"lang": "de"}, lang="de")
    _write(tmp_path, GOOD | {"prompt": again, "category": category})
    with pytest.raises(PromptsError, match="stands already in") as caught:
        read_training_prompts(tmp_path)
    assert f"{tmp_path / 'en.jsonl'}:1: " in str(caught.value)
    assert f"{tmp_path / 'de.jsonl'}:1, as 'law'" in str(caught.value)


def test_read_training_prompts_other_signs_are_other_prompts(tmp_path: Path) -> None:
    texts = ["17 * 23", "17 / 23", "17 - 23", "???", "..."]
    _write(tmp_path, *(GOOD | {"prompt": text} for text in texts))
    assert [row.prompt for row in read_training_prompts(tmp_path)] == texts


def test_read_training_prompts_bytes_that_are_no_utf8_are_refused_with_the_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "en.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(PromptsError, match=r"en\.jsonl:1: not a line of JSON in UTF-8"):
        read_training_prompts(tmp_path)


def test_read_training_prompts_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="no prompts"):
        read_training_prompts(tmp_path)
