"""The everyday categories of the general router, read from `categories.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

CATEGORIES_FILE = Path(__file__).with_name("categories.yaml")
_FIELDS = ("name", "title", "description", "boundary")


class CategoriesError(ValueError):
    """The list of categories is not well formed."""


@dataclass(frozen=True)
class Category:
    """One everyday category.

    Attributes:
        name: The name in artifacts and configs, lower case with hyphens.
        title: The name for people.
        description: One sentence on what belongs here; it can be embedded.
        boundary: Which way the doubtful cases go.
    """

    name: str
    title: str
    description: str
    boundary: str


@dataclass(frozen=True)
class Categories:
    """All categories in their order, and the name of the fallback, which is none of them."""

    entries: tuple[Category, ...]
    fallback: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)


def read_categories(path: Path = CATEGORIES_FILE) -> Categories:
    """Read and check a list of categories.

    Raises:
        CategoriesError: A field is missing, empty or unknown, a name stands
            twice, or the fallback is one of the categories.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or set(document) != {"fallback", "categories"}:
        raise CategoriesError(f"{path}: the keys must be 'fallback' and 'categories'")
    rows = document["categories"]
    if not isinstance(rows, list) or not rows:
        raise CategoriesError(f"{path}: 'categories' must be a list that is not empty")
    entries = tuple(_category(path, number, row) for number, row in enumerate(rows, start=1))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise CategoriesError(f"{path}: category {name!r} stands {names.count(name)} times")
    fallback = document["fallback"]
    if not isinstance(fallback, str) or not fallback or fallback in names:
        raise CategoriesError(
            f"{path}: the fallback {fallback!r} must be a name that is not a category"
        )
    return Categories(entries, fallback)


def _category(path: Path, number: int, row: object) -> Category:
    if not isinstance(row, dict) or set(row) != set(_FIELDS):
        raise CategoriesError(f"{path}: category {number} must have the keys {', '.join(_FIELDS)}")
    for key in _FIELDS:
        if not isinstance(row[key], str) or not row[key].strip():
            raise CategoriesError(f"{path}: category {number}: {key!r} must be a text")
    return Category(*(row[key].strip() for key in _FIELDS))


@cache
def general_categories() -> Categories:
    """Return the categories that ship with this package."""
    return read_categories()
