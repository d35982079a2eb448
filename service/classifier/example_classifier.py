"""Categories by description and examples: a classifier that needs no fitting. Pure.

Each category is the mean of its examples' vectors and its description's. A text belongs to the
nearest mean, with distances as linear discriminant analysis measures them: by a covariance within
categories that is shrunk toward one from other texts and toward the identity (Ledoit and Wolf,
2004, have the idea). Held-out examples give the temperature and the similarity below which a text
belongs to none of the categories. What belongs to none is left to the router's artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.classifier.classifier import GENERAL, Classifier, Reading, choose
from service.classifier.linear_heads import Head, Vector, log_softmax
from service.classifier.static_embedding_table import StaticTable
from service.types import CategoryScores

Floats = NDArray[np.float64]

FOLDS = 5
DESCRIPTION_WEIGHT = 5.0
"""A description counts as much as so many examples: it names the subject as no example does."""

# Shares of the examples' own covariance and of the one from other texts; the identity has the rest.
_OWN_SHARE, _OTHER_SHARE = 0.1, 0.3
_TEMPERATURES = np.geomspace(0.005, 2.0, 40)
# The exponent of the static table's posterior beside the encoder's, and the temperatures of both.
_STATIC_SHARE = 0.5
_JOINT_TEMPERATURES = np.geomspace(0.3, 3.0, 30)
# So many of the held-out examples are more similar to their category than the threshold.
_SIMILAR_SHARE = 0.95
# The similarity over which "belongs to it" turns into "belongs to none".
_SOFTNESS = 0.02
# A category of the artifact whose mean is so similar to a category's with examples is replaced by
# it; the others compete with it.
_SAME_SUBJECT = 0.75
_MIN_CONFIDENCE = 0.3
_MAX_NOVELTY = 0.5


@dataclass(frozen=True, slots=True)
class ExampleVectors:
    """The vectors of all examples and descriptions, of one table or encoder.

    Attributes:
        vectors: (examples, dims), of length 1.
        category: (examples,), the category's row.
        described: (categories, dims); zeros for a category without a description.
        within: (dims, dims), the covariance within categories of other texts; None if unknown.
    """

    vectors: NDArray[np.float32]
    category: NDArray[np.int64]
    described: NDArray[np.float32]
    within: NDArray[np.float32] | None = None


class Described(Protocol):
    """A category with its examples and its description."""

    @property
    def description(self) -> str:
        """What belongs to it; empty where nothing is said."""

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts of it."""


def example_texts(categories: Mapping[str, Described]) -> list[str]:
    """The examples of all categories, then the descriptions of those that have one."""
    return [
        *(text for category in categories.values() for text in category.examples),
        *(c.description for c in categories.values() if c.description.strip()),
    ]


def example_vectors(
    categories: Mapping[str, Described],
    vectors: NDArray[np.float32],
    within: NDArray[np.float32] | None = None,
) -> ExampleVectors:
    """Put the vectors of `example_texts`, (texts, dims), with their categories."""
    sizes = [len(category.examples) for category in categories.values()]
    described = np.zeros((len(sizes), vectors.shape[1]), dtype=np.float32)
    has = [bool(category.description.strip()) for category in categories.values()]
    described[np.flatnonzero(has)] = vectors[sum(sizes) :]
    category = np.repeat(np.arange(len(sizes)), sizes)
    return ExampleVectors(vectors[: sum(sizes)], category, described, within)


def fit_head(given: ExampleVectors) -> Head:
    """Fit a head, with its temperature and its threshold from held-out examples."""
    logits, similar = held_out(given)
    temperature = _temperature(logits, given.category)
    weight, bias, means = _discriminant(given, np.arange(len(given.category)))
    own = similar[np.arange(len(similar)), given.category]
    return Head(
        weight=(weight / temperature).astype(np.float32),
        bias=bias / temperature,
        earlier=None,
        means=means.astype(np.float32),
        min_similarity=float(np.quantile(own, 1 - _SIMILAR_SHARE)),
    )


def held_out(given: ExampleVectors) -> tuple[Floats, Floats]:
    """Logits and similarities of every example by the others, (examples, categories) each."""
    count, labels = len(given.category), len(given.described)
    logits, similar = np.zeros((count, labels)), np.zeros((count, labels))
    fold = _folds(given.category)
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        if not len(outside):
            continue
        weight, bias, means = _discriminant(given, inside)
        logits[outside] = given.vectors[outside] @ weight + bias
        similar[outside] = given.vectors[outside] @ means.T
    return logits, similar


def _folds(category: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fold for each example; each category is spread over the folds."""
    fold = np.zeros(len(category), dtype=np.int64)
    for label in range(int(category.max(initial=-1)) + 1):
        rows = np.flatnonzero(category == label)
        fold[rows] = np.arange(len(rows)) % FOLDS
    return fold


def _discriminant(given: ExampleVectors, rows: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """Linear discriminants of some of the examples: (dims, labels), (labels,), (labels, dims)."""
    vectors = given.vectors[rows].astype(np.float64)
    category = given.category[rows]
    labels, dims = given.described.shape
    member = np.eye(labels)[category]
    described = given.described.any(axis=1)
    count = member.sum(axis=0) + DESCRIPTION_WEIGHT * described
    total = member.T @ vectors + DESCRIPTION_WEIGHT * given.described
    means = total / np.maximum(count, 1)[:, None]
    apart = vectors - means[category]
    own = apart.T @ apart
    identity = np.eye(dims) / dims
    other = identity if given.within is None else given.within / np.trace(given.within)
    size = float(np.trace(own))
    shares = _OWN_SHARE if size > 0 else 0.0
    within = shares * own / max(size, 1e-9) + _OTHER_SHARE * other
    within += (1 - shares - _OTHER_SHARE) * identity
    # The trace is 1, so that logits have one scale for every number of dimensions.
    weight = np.linalg.solve(within * dims, means.T)
    length = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    return weight, -0.5 * (means.T * weight).sum(axis=0), means / length


def _temperature(logits: Floats, category: NDArray[np.int64]) -> float:
    rows = np.arange(len(category))
    losses = [
        -float(log_softmax(logits / temperature)[rows, category].mean())
        for temperature in _TEMPERATURES
    ]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def joint_temperature(static: ExampleVectors, encoder: ExampleVectors) -> float:
    """The temperature of both stages' product, by held-out examples.

    Args:
        static: The examples on the static table.
        encoder: The same examples on the encoder.
    """
    joint = log_softmax(_scaled_held_out(encoder) + _STATIC_SHARE * _scaled_held_out(static))
    rows = np.arange(len(encoder.category))
    losses = [
        -float(log_softmax(joint / temperature)[rows, encoder.category].mean())
        for temperature in _JOINT_TEMPERATURES
    ]
    return float(_JOINT_TEMPERATURES[int(np.argmin(losses))])


def _scaled_held_out(given: ExampleVectors) -> Floats:
    """Log posteriors of every example by the others, (examples, categories)."""
    logits, _ = held_out(given)
    return log_softmax(logits / _temperature(logits, given.category))


class ExampleClassifier:
    """Classifies by the examples' heads, and leaves the rest to the artifact's classifier.

    Where both stages read a text, the posterior is a product of theirs.

    Args:
        names: The categories with examples.
        table: The static table; None leaves that stage out.
        static: The head on the table.
        encoder: The head on the encoder; None leaves that stage out.
        base: The artifact's classifier; None without an artifact, where all else is `general`.
        joint: The temperature of both heads' product, see `joint_temperature`.
    """

    def __init__(
        self,
        names: Sequence[str],
        table: StaticTable | None,
        static: Head | None,
        encoder: Head | None = None,
        base: Classifier | None = None,
        joint: float = 1.0,
    ) -> None:
        self._joint = joint
        self._table = table
        self._static = static
        self._encoder = encoder
        self._base = base
        base_labels = base.labels if base is not None else (GENERAL,)
        self.labels = (*base_labels, *(name for name in names if name not in base_labels))
        self._columns = np.array([self.labels.index(name) for name in names], dtype=np.int64)
        self._rivals = {
            id(head): _rivals(head, of_base, base_labels, names)
            for head, of_base in (
                (static, base.static.head if base is not None and base.static else None),
                (encoder, base.encoder.head if base is not None and base.encoder else None),
            )
            if head is not None
        }
        self.min_confidence = base.min_confidence if base is not None else _MIN_CONFIDENCE
        self.max_novelty = base.max_novelty if base is not None else _MAX_NOVELTY

    def read(
        self, text: str, vector: Vector | None = None, earlier: Reading | None = None
    ) -> Reading:
        """Classify a text by the last stage that there is.

        Args:
            text: The text.
            vector: The encoder's vector of it, (dims,), where there is one.
            earlier: What the same stages made of it without the encoder, if that is known.
        """
        if self._base is not None:
            found = self._base.read(text, vector, earlier and earlier.base)
        else:
            found = Reading(np.ones(1), np.zeros(0), 1.0, "static")
        head, meaning = self._encoder, vector
        if head is None or meaning is None or not meaning.any():
            if self._static is None or self._table is None:
                return self._padded(found)
            head, meaning = self._static, self._table.embed(text)
        stage = "encoder" if head is self._encoder else "static"
        similarity = head.similarity(meaning)
        rivals = self._rivals[id(head)]
        bar = max(head.min_similarity, float((rivals @ meaning).max()) if len(rivals) else -1.0)
        # How surely the text is of one of the categories with examples at all.
        inside = 1 / (1 + np.exp((bar - similarity) / _SOFTNESS))
        posterior = np.zeros(len(self.labels))
        posterior[: len(found.posterior)] = (1 - inside) * found.posterior
        log_posterior = head.log_posterior(meaning)
        if stage == "encoder":
            log_posterior = self._with_static(text, log_posterior)
        np.add.at(posterior, self._columns, inside * np.exp(log_posterior))
        novelty = min(found.novelty, head.novelty(meaning, self.max_novelty))
        return Reading(posterior / posterior.sum(), found.factors, novelty, stage, found)

    def _with_static(self, text: str, log_posterior: Floats) -> Floats:
        """The encoder's log posterior, (categories,), times the static table's."""
        if self._static is None or self._table is None:
            return log_posterior
        meaning = self._table.embed(text)
        if not meaning.any():
            return log_posterior
        joint = log_posterior + _STATIC_SHARE * self._static.log_posterior(meaning)
        return log_softmax(joint / self._joint)

    def _padded(self, found: Reading) -> Reading:
        posterior = np.zeros(len(self.labels))
        posterior[: len(found.posterior)] = found.posterior
        return Reading(posterior, found.factors, found.novelty, found.stage, found)

    def decide(self, posterior: Floats, novelty: float, stage: str) -> CategoryScores:
        """Choose the category, see `choose`."""
        return choose(self.labels, posterior, novelty, stage, self.min_confidence, self.max_novelty)


def _rivals(
    head: Head, of_base: Head | None, labels: Sequence[str], names: Sequence[str]
) -> NDArray[np.float32]:
    """The means of the artifact's categories that are other subjects, (rivals, dims)."""
    if of_base is None or of_base.dims != head.dims:
        return np.zeros((0, head.dims), dtype=np.float32)
    alike = (of_base.means @ head.means.T).max(axis=1) >= _SAME_SUBJECT
    taken = np.array([label == GENERAL or label in names for label in labels])
    return np.asarray(of_base.means[~(alike | taken)])


def confusion(
    names: Sequence[str], logits: Floats, category: NDArray[np.int64]
) -> Mapping[str, Mapping[str, int]]:
    """Count, for each category, which category its held-out examples were given."""
    given = logits.argmax(axis=1)
    return {
        name: {other: int(((category == i) & (given == j)).sum()) for j, other in enumerate(names)}
        for i, name in enumerate(names)
    }
