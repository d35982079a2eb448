"""The shipped prompts, and what is refused in a file of prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from router_models.general.categories import general_categories
from router_models.general.held_out_prompts import held_out_prompts
from router_models.general.training_prompt_reader import (
    LabelledPrompt,
    PromptsError,
    normalised_text,
    read_prompts,
)

# The fewest prompts of each category, by language.
LEAST = {"en": 60} | dict.fromkeys(("de", "fr", "es", "it", "zh"), 10)
LEAST |= dict.fromkeys(("pt", "ja"), 6) | dict.fromkeys(("nl", "pl", "ru"), 5)
LEAST |= dict.fromkeys(("ar", "hi"), 4)
# Two prompts whose sets of three-letter sequences overlap more (Jaccard) are near-duplicates.
MOST_ALIKE = 0.65
# A prompt whose TF-IDF vector has a larger cosine with a held-out one asks nearly the same.
MOST_LIKE_HELD_OUT = 0.38
GOOD = {"prompt": "Is it legal?", "category": "law", "lang": "en"}


@pytest.fixture(scope="module")
def shipped() -> tuple[LabelledPrompt, ...]:
    return read_prompts()


def test_shipped_prompts_have_enough_of_each_category_in_each_language(
    shipped: tuple[LabelledPrompt, ...],
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
    shipped: tuple[LabelledPrompt, ...], lang: str
) -> None:
    texts = [row.prompt for row in shipped if row.lang == lang]
    alike = _alikeness(texts)
    found = [(texts[i], texts[j]) for i, j in np.argwhere(np.triu(alike, 1) > MOST_ALIKE)]
    assert found == []


@pytest.mark.parametrize("lang", sorted(LEAST))
def test_shipped_prompts_are_not_near_held_out_prompts(
    shipped: tuple[LabelledPrompt, ...], lang: str
) -> None:
    taught = [row.prompt for row in shipped if row.lang == lang]
    held_out = [row.prompt for row in held_out_prompts() if row.language == lang]
    near = np.argwhere(_cosines(taught, held_out) > MOST_LIKE_HELD_OUT)
    assert [(taught[i], held_out[j]) for i, j in near] == []


def test_cosines_find_the_same_question_and_pass_the_same_opening() -> None:
    taught = ["what's the halting problem", "what's the difference between a felony and a crime"]
    held_out = ["The halting problem: why do people care?", "what's the difference between cats"]
    others = [f"what's the difference between {n} and {n + 1}" for n in range(100, 130)]
    cosines = _cosines(taught + others, held_out)
    assert cosines[0, 0] > MOST_LIKE_HELD_OUT > cosines[1, 1]


def _cosines(taught: list[str], held_out: list[str]) -> np.ndarray:
    """Return the cosines of TF-IDF vectors of 2 to 5 letters, taught × held out.

    Rare sequences weigh more, so that a stock phrase makes two prompts less alike
    than a shared subject does.
    """
    column: dict[str, int] = {}
    rows, columns, counts = [], [], []
    for i, text in enumerate(taught + held_out):
        padded = f" {normalised_text(text)} "
        grams = Counter(padded[k : k + n] for n in range(2, 6) for k in range(len(padded) - n + 1))
        rows += [i] * len(grams)
        columns += [column.setdefault(gram, len(column)) for gram in grams]
        counts += list(grams.values())
    table = csr_matrix((1 + np.log(counts), (rows, columns)))
    table = table.multiply(1 + np.log((table.shape[0] + 1) / (np.bincount(columns) + 1))).tocsr()
    table = table.multiply(1 / np.sqrt(table.multiply(table).sum(axis=1))).tocsr()
    return np.asarray((table[: len(taught)] @ table[len(taught) :].T).toarray())


def test_alikeness_finds_a_changed_filler_and_passes_another_question() -> None:
    alike = _alikeness(
        [
            "write a short poem about the rain in spring",
            "Write a short poem about the rain in autumn",
            "who was the first emperor of China",
        ]
    )
    assert alike[0, 1] > MOST_ALIKE > alike[0, 2]


def _alikeness(texts: list[str]) -> np.ndarray:
    """Return the Jaccard index of the sets of three-letter sequences, texts × texts."""
    column: dict[str, int] = {}
    at: list[tuple[int, int]] = []
    for i, text in enumerate(texts):
        padded = f"  {normalised_text(text)} "
        grams = {padded[k : k + 3] for k in range(len(padded) - 2)}
        at += [(i, column.setdefault(gram, len(column))) for gram in grams]
    rows, columns = zip(*at, strict=True)
    table = csr_matrix((np.ones(len(at), np.float32), (rows, columns)))
    shared = (table @ table.T).toarray()
    sizes = shared.diagonal()
    return np.asarray(shared / (sizes[:, None] + sizes[None, :] - shared))


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
    shipped: tuple[LabelledPrompt, ...], prompt: str, category: str
) -> None:
    assert LabelledPrompt(prompt, category, "en") in shipped


def _write(folder: Path, *lines: object, lang: str = "en") -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / f"{lang}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_read_prompts_good_rows_are_read_by_language(tmp_path: Path) -> None:
    _write(tmp_path, GOOD, "", GOOD | {"prompt": "1 + 1\u2028?", "category": "coding"})
    _write(tmp_path, GOOD | {"prompt": "Ist das erlaubt?", "lang": "de"}, lang="de")
    assert read_prompts(tmp_path) == (
        LabelledPrompt("Ist das erlaubt?", "law", "de"),
        LabelledPrompt("Is it legal?", "law", "en"),
        LabelledPrompt("1 + 1\u2028?", "coding", "en"),
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
def test_read_prompts_bad_row_is_refused_with_file_and_line(
    tmp_path: Path, row: object, message: str
) -> None:
    _write(tmp_path, GOOD | {"prompt": "May I?"}, "", row)
    with pytest.raises(PromptsError, match=message) as caught:
        read_prompts(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'en.jsonl'}:3: ")


@pytest.mark.parametrize(
    "again",
    ["Is it legal?", "is it LEGAL", "  Is  it\nlegal . ", "Ｉｓ it legal?"],
)
@pytest.mark.parametrize("category", ["law", "coding"])
def test_read_prompts_same_text_again_is_refused_with_both_places(
    tmp_path: Path, again: str, category: str
) -> None:
    _write(tmp_path, GOOD | {"lang": "de"}, lang="de")
    _write(tmp_path, GOOD | {"prompt": again, "category": category})
    with pytest.raises(PromptsError, match="stands already in") as caught:
        read_prompts(tmp_path)
    assert f"{tmp_path / 'en.jsonl'}:1: " in str(caught.value)
    assert f"{tmp_path / 'de.jsonl'}:1, as 'law'" in str(caught.value)


def test_read_prompts_other_signs_are_other_prompts(tmp_path: Path) -> None:
    texts = ["17 * 23", "17 / 23", "17 - 23", "???", "..."]
    _write(tmp_path, *(GOOD | {"prompt": text} for text in texts))
    assert [row.prompt for row in read_prompts(tmp_path)] == texts


def test_read_prompts_bytes_that_are_no_utf8_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "en.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(PromptsError, match=r"en\.jsonl:1: not a line of JSON in UTF-8"):
        read_prompts(tmp_path)


def test_read_prompts_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match="no prompts"):
        read_prompts(tmp_path)
