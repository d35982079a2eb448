"""Which prompts count as nearly the same, and how they are taken out."""

from __future__ import annotations

import json
from pathlib import Path

from router_models.general.near_duplicates import (
    MOST_ALIKE,
    MOST_LIKE_HELD_OUT,
    alikeness,
    clean,
    cosines,
    held_out_texts,
    keep,
)


def test_cosines_find_the_same_question_and_pass_the_same_opening() -> None:
    taught = ["what's the halting problem", "what's the difference between a felony and a crime"]
    held_out = ["The halting problem: why do people care?", "what's the difference between cats"]
    others = [f"what's the difference between {n} and {n + 1}" for n in range(100, 130)]
    found = cosines(taught + others, held_out)
    assert found[0, 0] > MOST_LIKE_HELD_OUT > found[1, 1]


def test_alikeness_finds_a_changed_filler_and_passes_another_question() -> None:
    alike = alikeness(
        [
            "write a short poem about the rain in spring",
            "Write a short poem about the rain in autumn",
            "who was the first emperor of China",
        ]
    )
    assert alike[0, 1] > MOST_ALIKE > alike[0, 2]


def test_keep_takes_the_first_of_twins_and_none_near_a_held_out_prompt() -> None:
    texts = [
        "what's the halting problem",
        "write a short poem about the rain in spring",
        "Write a short poem about the rain in autumn",
        "who was the first emperor of China",
    ]
    others = [f"what's the difference between {n} and {n + 1}" for n in range(100, 130)]
    kept = keep(texts + others[:1], ["The halting problem: why do people care?", *others[5:]])
    assert kept[:4] == [False, True, False, True]
    assert keep(texts, []) == [True, True, False, True]
    assert keep([], ["a"]) == []


def test_held_out_texts_are_those_of_both_authors_and_their_paraphrases() -> None:
    assert len(held_out_texts("nl")) == 26
    assert len(held_out_texts("en")) > 500


def test_keep_takes_none_near_any_of_the_other_sets() -> None:
    texts = ["what's the halting problem", "who was the first emperor of China"]
    others = [f"what's the difference between {n} and {n + 1}" for n in range(100, 130)]
    first, second = [*others, texts[0] + "?"], [*others, texts[1] + "!"]
    assert keep(texts, first) == [False, True]
    assert keep(texts, first, second) == [False, False]


def test_clean_rewrites_files_without_near_prompts(tmp_path: Path) -> None:
    texts = {"a": ["say en", "count, ünd"], "b": ["say en!", "x"]}
    for name, given in texts.items():
        lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in given]
        (tmp_path / name).write_text("".join(lines))
    files = [tmp_path / name for name in texts]
    assert clean(files, ["far away"], ["say en"]) == [(1, 1), (1, 1)]
    assert [json.loads(file.read_text())["prompt"] for file in files] == ["count, ünd", "x"]
    assert clean(files, ["far away"], ["say en"]) == [(1, 0), (1, 0)]
