"""The list of everyday categories, and what is refused in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from router_models.general.categories import (
    CategoriesError,
    general_categories,
    read_categories,
)

ROW = {"name": "law", "title": "Law", "description": "About law.", "boundary": "Not medicine."}


def test_shipped_categories_are_26_and_named_in_order() -> None:
    assert general_categories().fallback == "general"
    assert " ".join(general_categories().names) == (
        "coding shell-sql math-word-problems symbolic-math logic-puzzles natural-sciences "
        "engineering computer-science law medicine business psychology philosophy history facts "
        "everyday-advice writing editing translation summarising extraction roleplay small-talk "
        "commands tool-use safety"
    )


def test_shipped_descriptions_are_one_sentence_each() -> None:
    for entry in general_categories().entries:
        assert re.fullmatch(r"[^.]+\.", entry.description), entry.name
        assert 60 <= len(entry.description) <= 300, entry.name


def test_shipped_boundaries_name_another_category_each() -> None:
    names = set(general_categories().names)
    for entry in general_categories().entries:
        named = {name for name in names if re.search(rf"(?<![\w-]){name}(?![\w-])", entry.boundary)}
        assert named - {entry.name}, entry.name


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "the keys must be"),
        ({"fallback": "general"}, "the keys must be"),
        ({"fallback": "general", "categories": []}, "not empty"),
        ({"fallback": "general", "categories": ["law"]}, "category 1 must have the keys"),
        ({"fallback": "general", "categories": [ROW | {"x": 1}]}, "must have the keys"),
        ({"fallback": "general", "categories": [ROW | {"title": " "}]}, "'title' must be a text"),
        ({"fallback": "general", "categories": [ROW, ROW]}, "'law' stands 2 times"),
        ({"fallback": "law", "categories": [ROW]}, "the fallback 'law'"),
        ({"fallback": None, "categories": [ROW]}, "the fallback None"),
    ],
)
def test_a_malformed_list_is_refused_with_its_place(
    tmp_path: Path, document: object, message: str
) -> None:
    path = tmp_path / "categories.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    with pytest.raises(CategoriesError, match=message) as caught:
        read_categories(path)
    assert str(path) in str(caught.value)
