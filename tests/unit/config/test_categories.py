"""Section `categories`: bad examples are named with line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.config import load_config
from service.errors import ConfigError

HEAD = """experts:
  a: {model: m, categories: [general]}
  b: {model: m, categories: [food]}
pools: {cpu: {engine: simulated}}
categories:
"""


def faults(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "coe.yaml"
    path.write_text(HEAD + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return [line.removeprefix(str(path)) for line in caught.value.message.splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "  food:\n    examples:\n      - one\n      - two\n",
            [":8: categories.food.examples: 2 examples are too few"],
        ),
        (
            "  food:\n    examples: [a, b, c]\n  law:\n    expert: a\n    examples:\n"
            "      - x\n      - y\n      - ' A '\n",
            [":13: categories.law.examples.2: the same example as categories.food.examples.0"],
        ),
        (
            "  food:\n    examples:\n      - a\n      - b\n      - b\n",
            [":10: categories.food.examples.2: the same example as categories.food.examples.1"],
        ),
        (
            "  food:\n    examples: [a, b, ' ']\n",
            [":7: categories.food.examples.2: an example must not be empty"],
        ),
        ("  law:\n    examples: [a, b, c]\n", [":7: categories.law: no expert has this category"]),
        (
            "  law:\n    expert: c\n    examples: [a, b, c]\n",
            [":7: categories.law.expert: no expert 'c'"],
        ),
        (
            "  food: {examples: [a, b, c]}\nrouter: {static: false}\n",
            [":7: router.static: categories with examples need it, or an encoder"],
        ),
        ("  food:\n    examples: [1, b, c]\n", [": categories.food.examples.0: a text is needed"]),
        ("  food:\n    exmples: [a]\n", [": categories.food.examples: missing"]),
    ],
)
def test_bad_examples_are_named_with_line_and_field(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    found = faults(tmp_path, text)
    for line in expected:
        assert any(got.startswith(line) for got in found), found


def test_category_goes_to_its_expert_or_to_the_one_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    law = "  law: {expert: a, examples: [x, y, 'z ${HOME}']}\n"
    path.write_text(HEAD + "  food: {examples: [a, b, c]}\n" + law)
    assert load_config(path).category_map() == {"law": "a", "general": "a", "food": "b"}


def test_encoder_folder_is_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(HEAD.replace("categories:\n", "") + "router: {encoder: {model: ./minilm}}\n")
    encoder = load_config(path).router.encoder
    assert encoder is not None
    assert encoder.model == str(tmp_path / "minilm")
