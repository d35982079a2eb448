"""The table of a config's texts names every field of the schema that can hold one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, Field

from service.config import Config
from service.config.name_and_path_fields import TEXT_FIELDS, Meaning, holders, move_paths
from service.config.section_base import Section


def _types(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        return
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _text_fields(
    section: type[BaseModel], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """Yield the path of every field that can hold any text, and of every mapping by name."""
    for name, field in section.model_fields.items():
        types = list(_types(field.annotation))
        if str in types or Any in types:
            yield (*above, name)
        named = any(get_origin(one) is dict for one in types)
        for inner in types:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _text_fields(inner, (*above, name, *(("*",) if named else ())))


def test_text_fields_are_those_of_the_schema() -> None:
    assert {*_text_fields(Config)} == {*TEXT_FIELDS}


def test_text_fields_of_a_new_section_would_be_found() -> None:
    class Inner(Section):
        path: str | None = None
        number: int = 0

    class Outer(Section):
        named: dict[str, Inner] = Field(default_factory=dict)
        one: Inner | None = None
        kind: Literal["a"] = "a"
        listed: tuple[str, ...] = ()

    found = {*_text_fields(Outer)}
    assert found == {("named",), ("named", "*", "path"), ("one", "path"), ("listed",)}


@pytest.mark.parametrize(
    ("word", "meanings"),
    [
        ("expert", {Meaning.EXPERT}),
        ("folder", {Meaning.PATH}),
        ("file", {Meaning.PATH}),
        ("dir", {Meaning.PATH}),
        ("path", {Meaning.PATH}),
        ("tenant", {Meaning.TENANT}),
        ("categories", {Meaning.CATEGORY}),
    ],
)
def test_text_fields_with_a_telling_name_have_its_meaning(
    word: str, meanings: set[Meaning]
) -> None:
    for place, meaning in TEXT_FIELDS.items():
        if word in place[-1].removesuffix("s").split("_") or place[-1] == word:
            assert meaning in meanings, place


def test_holders_are_the_mappings_that_have_the_field() -> None:
    data = {"tenants": {"a": {"experts": ["x"]}, "b": {}, "c": None}, "keys": None}
    found = list(holders(data, ("tenants", "*", "experts")))
    assert found == [({"experts": ["x"]}, ("tenants", "a", "experts"))]
    assert not list(holders(data, ("keys", "*", "experts")))
    assert not list(holders(data, ("shadow", "folder")))


def test_move_paths_leaves_other_texts() -> None:
    data = {
        "experts": {"a": {"model": "Org/Name", "description": "./no/path"}},
        "pools": {"p": {"vllm": {"args": {"speculative_config": 3, "seed": 1}}}},
        "models_dir": None,
    }
    move_paths(data, lambda path: "moved")
    assert "moved" not in repr(data)
