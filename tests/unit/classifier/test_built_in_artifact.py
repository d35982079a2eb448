"""The built-in general router: its categories, and prompts that everybody would sort alike."""

from __future__ import annotations

import random

import pytest

from router_models.general.categories import general_categories
from service.classifier.built_in_artifact import (
    BUILT_IN,
    DEFAULT_ENCODER,
    built_in_artifact,
    encoder_for,
)
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.router_artifact import WEIGHTS
from service.classifier.static_embedding_table import table_of

MAX_BYTES = 12 << 20


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier.from_artifact(built_in_artifact(), table_of(built_in_artifact()))


def test_built_in_has_the_everyday_categories_and_general(classifier: Classifier) -> None:
    assert set(classifier.labels) == {*general_categories().names, GENERAL}
    assert classifier.static is not None
    assert classifier.encoder is not None


def test_built_in_is_small_and_its_card_credits_all_data() -> None:
    assert (BUILT_IN / WEIGHTS).stat().st_size <= MAX_BYTES
    card = (BUILT_IN / "README.md").read_text(encoding="utf-8")
    data = built_in_artifact().manifest["data"]
    assert {d["license"] for d in data} == {"Apache-2.0", "MIT", "CC-BY-3.0"}
    assert all(d["credit"] in card for d in data if d["credit"] != "this project")
    assert "llmrouter" not in card.lower()
    assert "routerdc" not in card.lower()


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("SELECT all users older than 30 in SQL", "shell-sql"),
        ("regex to match an email", "coding"),
        ("Is it legal to record a phone call in Germany?", "law"),
        ("Give me a recipe for lasagna", "everyday-advice"),
        ("def fib(n):", "coding"),
        ("translate 'good morning' into French", "translation"),
        ("fasse diesen Text zusammen: Der Zug kam zu spät.", "summarising"),
        ("asdf jkl", GENERAL),
        ("???", GENERAL),
        ("房东不退押金，我能起诉他吗", "law"),
        ("переведи на английский: где вокзал", "translation"),
        ("写一个Python函数计算斐波那契数列", "coding"),
    ],
)
def test_built_in_sorts_everyday_prompts(
    classifier: Classifier, prompt: str, category: str
) -> None:
    for form in (prompt, prompt.lower(), f"  {prompt}\n"):
        assert classifier.classify(form).category == category


def test_encoder_for_is_the_config_s_or_the_one_of_the_fit() -> None:
    built_in = built_in_artifact()
    assert encoder_for(None, built_in) == "use-multilingual-v3"
    assert encoder_for("./mine", built_in) == "./mine"
    assert encoder_for(None, None) == DEFAULT_ENCODER


def test_built_in_takes_any_text(classifier: Classifier) -> None:
    draw = random.Random(2)
    for _ in range(200):
        text = "".join(chr(draw.randrange(1, 0xFFFF)) for _ in range(draw.randrange(0, 60)))
        scores = classifier.classify(text)
        assert abs(sum(scores.probabilities) - 1) < 1e-6
