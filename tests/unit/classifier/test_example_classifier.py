"""Categories by description and examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from service.classifier.classifier import GENERAL
from service.classifier.example_classifier import (
    ExampleClassifier,
    ExampleVectors,
    confusion,
    example_texts,
    example_vectors,
    fit_head,
    held_out,
    joint_temperature,
)
from service.classifier.linear_heads import Head
from service.classifier.static_embedding_table import built_in_table


@dataclass(frozen=True)
class Described:
    examples: tuple[str, ...]
    description: str = ""


CATEGORIES = {
    "legal": Described(
        (
            "can my landlord keep the deposit",
            "is it legal to record a phone call",
            "what is the penalty for drunk driving",
            "how do i contest a will in court",
            "does a verbal contract count",
            "what rights does a tenant have",
        ),
        "Law: contracts, courts, crimes, rights and tenancy.",
    ),
    "food": Described(
        (
            "give me a recipe for lasagna",
            "how long do i boil eggs",
            "what can i cook with leftover rice",
            "how do i make a sourdough starter",
            "which spices go with lamb",
            "how to bake a chocolate cake",
        ),
        "Cooking: recipes, baking, ingredients and kitchens.",
    ),
}
NAMES = tuple(CATEGORIES)


def head(categories: dict[str, Described] = CATEGORIES) -> Head:
    table = built_in_table()
    vectors = np.stack([table.embed(text) for text in example_texts(categories)])
    return fit_head(example_vectors(categories, vectors, table.within))


@pytest.fixture(scope="module")
def classifier() -> ExampleClassifier:
    return ExampleClassifier(NAMES, built_in_table(), head())


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("may my employer fire me without a contract", "legal"),
        ("what happens if i am sued in court", "legal"),
        ("recipe for tomato soup", "food"),
        ("how hot should the oven be for bread", "food"),
        ("", GENERAL),
        ("zxqv 77", GENERAL),
        ("derive the integral of cos x squared", GENERAL),
    ],
)
def test_read_new_prompt_finds_its_category_or_none(
    classifier: ExampleClassifier, text: str, category: str
) -> None:
    found = classifier.read(text)
    assert found.posterior.sum() == pytest.approx(1)
    assert classifier.decide(found.posterior, found.novelty, found.stage).category == category


def test_read_with_a_vector_asks_the_encoder_head() -> None:
    eye = np.eye(2, dtype=np.float32)
    encoder = Head(eye * 20, np.zeros(2), None, eye, 0.5)
    classifier = ExampleClassifier(NAMES, built_in_table(), head(), encoder)
    first = classifier.read("recipe for tomato soup")
    second = classifier.read("recipe for tomato soup", eye[0])
    assert (first.stage, second.stage) == ("static", "encoder")
    assert classifier.labels[int(second.posterior.argmax())] == "legal"


@pytest.mark.parametrize("joint", [0.5, 1.0, 2.0])
def test_read_by_both_stages_multiplies_their_posteriors(joint: float) -> None:
    eye = np.eye(2, dtype=np.float32)
    text = "recipe for tomato soup"
    static = np.exp(head().log_posterior(built_in_table().embed(text)))
    for sure in (0.2, 1.0, 20.0):
        encoder = Head(eye * sure, np.zeros(2), None, eye, -1.0)
        alone = ExampleClassifier(NAMES, None, None, encoder)
        both = ExampleClassifier(NAMES, built_in_table(), head(), encoder, joint=joint)
        by_encoder = np.exp(encoder.log_posterior(eye[0]))
        expected = (by_encoder * static**0.5) ** (1 / joint)
        expected /= expected.sum()
        for classifier, wanted in ((alone, by_encoder), (both, expected)):
            found = classifier.read(text, eye[0]).posterior
            ours = found[[classifier.labels.index(name) for name in NAMES]]
            np.testing.assert_allclose(ours / ours.sum(), wanted, atol=1e-6)


def test_joint_temperature_is_greater_where_both_stages_say_the_same() -> None:
    draw = np.random.default_rng(3)

    def examples(noise: float, seed: int) -> ExampleVectors:
        near = np.random.default_rng(seed).normal(0, noise, (80, 6))
        vectors = np.repeat(np.eye(6)[:4], 20, axis=0) + near
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        category = np.repeat(np.arange(4), 20)
        return ExampleVectors(vectors.astype(np.float32), category, np.zeros((4, 6), np.float32))

    same = examples(0.6, 1)
    other = examples(0.6, int(draw.integers(2, 99)))
    # One stage that is asked twice has nothing to add, and must not be surer.
    assert joint_temperature(same, same) > joint_temperature(other, same)
    assert joint_temperature(same, same) == pytest.approx(1.5, rel=0.1)


def test_description_alone_moves_the_mean() -> None:
    bare = {name: Described(c.examples[:3]) for name, c in CATEGORIES.items()}
    told = {name: Described(c.examples[:3], c.description) for name, c in CATEGORIES.items()}
    question = built_in_table().embed(CATEGORIES["legal"].description)
    assert head(told).similarity(question) > head(bare).similarity(question)


def test_held_out_judges_no_example_by_itself() -> None:
    # Every example is orthogonal to all others: knowing it would be the only way to be right.
    vectors = np.eye(6, dtype=np.float32)
    given = example_vectors(
        {"a": Described(("1", "2", "3")), "b": Described(("4", "5", "6"))}, vectors
    )
    logits, similar = held_out(given)
    rows = np.arange(6)
    assert similar[rows, given.category].max() == pytest.approx(0, abs=1e-6)
    assert logits[rows, given.category].max() <= logits[rows, 1 - given.category].min() + 1e-6


def test_confusion_counts_every_example_once() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert confusion(("a", "b"), logits, np.array([0, 0, 1])) == {
        "a": {"a": 1, "b": 1},
        "b": {"a": 0, "b": 1},
    }
