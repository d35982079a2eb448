"""Classifies prompts: posterior over categories, confidence and novelty.

The first stage is a multinomial logistic regression over hashed n-grams (`features`), which a
temperature from held-out rows calibrates, and then a head on the static table. It needs no
accelerator and takes well under a millisecond, so it runs on the event loop. Where the caller has
an encoder's vector of the text, a second head adds to that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.classifier.hashed_ngrams import Features, FeatureSpec, Featurizer
from service.classifier.linear_heads import Head, Vector, log_softmax, read_head
from service.classifier.router_artifact import Artifact
from service.classifier.static_embedding_table import StaticTable
from service.errors import ArtifactError
from service.types import CategoryScores

GENERAL = "general"
"""The category of prompts that the classifier is unsure of, or that are far from all it saw."""

Floats = NDArray[np.float64]

# As far as `log_softmax` goes down.
_LEAST_PROBABILITY = float(np.exp(-20.0))


@dataclass(frozen=True, slots=True)
class Assessment:
    """The output of the linear model for one prompt.

    Attributes:
        scores: The scores of the categories.
        factors: (factors,), estimates of how hard the prompt is for different experts. It is empty
            if the artifact only classifies.
        last_turn: (labels,), likelihoods of the categories by a conversation's last turn alone, up
            to a factor: flat where the turn has no content of its own. None if they are unknown.
        readings: What each turn that was read said, by its text, so that a later stage goes on from
            there.
    """

    scores: CategoryScores
    factors: Floats
    last_turn: Floats | None = None
    readings: Mapping[str, Reading] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a classifier makes of one text.

    Attributes:
        posterior: (labels,), probabilities.
        factors: (factors,), see `Assessment`.
        novelty: In [0, 1].
        stage: `ngrams`, `static` or `encoder`: the last stage that was asked.
        base: What the artifact's classifier made of it, where categories with examples stand
            beside it.
    """

    posterior: Floats
    factors: Floats
    novelty: float
    stage: str
    base: Reading | None = None


class TextClassifier(Protocol):
    """A classifier of texts, by whatever means."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The categories."""

    @property
    def max_novelty(self) -> float:
        """Texts with more novelty count as `general`."""

    def read(
        self, text: str, vector: Vector | None = None, earlier: Reading | None = None
    ) -> Reading:
        """Classify a text.

        Args:
            text: The text.
            vector: The encoder's vector of it, (dims,), where there is one.
            earlier: What the same stages made of it without the encoder, if that is known.
        """

    def decide(self, posterior: Floats, novelty: float, stage: str) -> CategoryScores:
        """Choose the category."""


@dataclass(frozen=True, slots=True)
class StaticStage:
    """The static table with the head on it."""

    table: StaticTable
    head: Head


@dataclass(frozen=True, slots=True)
class EncoderStage:
    """The head on an encoder, and the encoder's vector of `PROBE_TEXT`, (dims,)."""

    head: Head
    probe: NDArray[np.float32]


class Classifier:
    """Computes `CategoryScores` from text. It is immutable, so threads may share it."""

    def __init__(
        self,
        *,
        spec: FeatureSpec,
        labels: tuple[str, ...],
        idf: NDArray[np.floating],
        weight: NDArray[np.floating],
        bias: NDArray[np.floating],
        known: NDArray[np.uint8],
        temperature: float,
        min_confidence: float,
        max_novelty: float,
        factor_weight: NDArray[np.floating] | None = None,
        factor_bias: NDArray[np.floating] | None = None,
        static: StaticStage | None = None,
        encoder: EncoderStage | None = None,
    ) -> None:
        """Create a classifier from fitted arrays.

        The shapes are: `idf` (buckets,), `weight` (buckets, labels), `bias` (labels,),
        `factor_weight` (buckets, factors) and `factor_bias` (factors,). `known` is the bitmap of
        seen marks, (2**known_bits / 8,), as `numpy.packbits` packs it. `static` and `encoder` are
        the heads on the static table and on an encoder.
        """
        self.static = static
        self.encoder = encoder
        self.labels = labels
        self.spec = spec
        self.min_confidence = min_confidence
        self.max_novelty = max_novelty
        self._featurizer = Featurizer(spec)
        scale = np.asarray(idf, dtype=np.float32)
        self._square = scale * scale
        # The weights include the inverse document frequency and the temperature. The columns of the
        # factors follow those of the labels, so that one pass over the n-grams computes both.
        columns = [np.asarray(weight, dtype=np.float32) / np.float32(temperature)]
        biases = [np.asarray(bias, dtype=np.float64) / temperature]
        if factor_weight is not None and factor_bias is not None:
            columns.append(np.asarray(factor_weight, dtype=np.float32))
            biases.append(np.asarray(factor_bias, dtype=np.float64))
        self._weight = np.concatenate(columns, axis=1)
        self._weight *= scale[:, None]
        self._bias = np.concatenate(biases)
        self._known = np.unpackbits(known).view(np.bool_)

    @classmethod
    def from_artifact(cls, artifact: Artifact, table: StaticTable | None = None) -> Classifier:
        """Create the classifier of an artifact.

        Args:
            artifact: The artifact.
            table: The static table. Without one, the artifact's head on it is left out.

        Raises:
            ArtifactError: The artifact can't be used.
        """
        section = artifact.section("classifier")
        try:
            spec = FeatureSpec.from_json(section["features"])
            labels = tuple(str(label) for label in section["categories"])
            temperature = float(section["calibration"]["temperature"])
            min_confidence = float(section["thresholds"]["min_confidence"])
            max_novelty = float(section["thresholds"]["max_novelty"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{artifact.path}: manifest, classifier: {error!r}") from error
        if not labels or len(set(labels)) != len(labels) or not 1e-3 < temperature < 1e3:
            raise ArtifactError(
                f"{artifact.path}: manifest, classifier: categories must be distinct and "
                "at least one, temperature within 0.001..1000"
            )
        known = artifact.tensor("classifier.known", ((1 << spec.known_bits) // 8,))
        if known.dtype != np.uint8:
            raise ArtifactError(f"{artifact.path}: classifier.known must be uint8")
        static: StaticStage | None = None
        fitted = artifact.part("classifier", "static")
        if table is not None and fitted is not None:
            if fitted.get("table_sha256") != table.digest:
                raise ArtifactError(
                    f"{artifact.path}: fitted with another static table than the one that is "
                    "loaded; fit it again, or set router.static to false"
                )
            static = StaticStage(table, read_head(artifact, "static", len(labels), table.dims))
        factors = section.get("factors", 0)
        if not isinstance(factors, int) or not 0 <= factors <= 256:
            raise ArtifactError(f"{artifact.path}: manifest, classifier: factors must be 0..256")
        return cls(
            factor_weight=artifact.tensor("classifier.factor_weight", (spec.buckets, factors))
            if factors
            else None,
            factor_bias=artifact.tensor("classifier.factor_bias", (factors,)) if factors else None,
            static=static,
            encoder=_encoder_stage(artifact, len(labels)),
            spec=spec,
            labels=labels,
            idf=artifact.tensor("classifier.idf", (spec.buckets,)),
            weight=artifact.tensor("classifier.weight", (spec.buckets, len(labels))),
            bias=artifact.tensor("classifier.bias", (len(labels),)),
            known=known,
            temperature=temperature,
            min_confidence=min_confidence,
            max_novelty=max_novelty,
        )

    @property
    def memory_bytes(self) -> int:
        """Size of the arrays in bytes, the static table included."""
        arrays = (self._square, self._weight, self._bias, self._known)
        total = sum(array.nbytes for array in arrays)
        if self.static is not None:
            total += self.static.table.memory_bytes + self.static.head.memory_bytes
        return total + (self.encoder.head.memory_bytes if self.encoder is not None else 0)

    def features(self, text: str) -> Features:
        """Compute the features of a text. The time has a bound for texts of any length."""
        return self._featurizer(text)

    def classify(self, text: str) -> CategoryScores:
        """Compute the posterior over `labels` for a text. The text may be any `str`."""
        return self.assess(text).scores

    def assess(self, text: str) -> Assessment:
        """Compute posterior and factors of a text. The text may be any `str`."""
        found = self.read(text)
        scores = self.decide(found.posterior, found.novelty, found.stage)
        return Assessment(scores, found.factors)

    def read(
        self, text: str, vector: Vector | None = None, earlier: Reading | None = None
    ) -> Reading:
        """Classify a text by every stage that there is.

        A text is new only if it is so for all of them.

        Args:
            text: The text.
            vector: The encoder's vector of it, (dims,), where the caller has one.
            earlier: What the stages before the encoder made of it, if that is known.
        """
        found = self._read_first(text) if earlier is None else earlier
        # An encoder gives zeros for a script that it does not read.
        if self.encoder is None or vector is None or not vector.any():
            return found
        before = np.log(np.maximum(found.posterior, _LEAST_PROBABILITY))
        odds = np.exp(self.encoder.head.log_posterior(vector, before))
        novelty = min(found.novelty, self.encoder.head.novelty(vector, self.max_novelty))
        return Reading(odds / odds.sum(), found.factors, novelty, "encoder")

    def _read_first(self, text: str) -> Reading:
        """Classify a text by n-grams and the static table."""
        features = self._featurizer(text)
        log_posterior, factors = self._logits(features)
        novelty, stage = self.novelty(features), "ngrams"
        if self.static is not None:
            meaning = self.static.table.embed(text)
            if meaning.any():
                log_posterior = self.static.head.log_posterior(meaning, log_posterior)
            novelty = min(novelty, self.static.head.novelty(meaning, self.max_novelty))
            stage = "static"
        odds = np.exp(log_posterior)
        return Reading(odds / odds.sum(), factors, novelty, stage)

    def infer(self, features: Features) -> tuple[Floats, Floats]:
        """Compute probabilities by n-grams alone, (labels,), and factors, (factors,)."""
        log_posterior, factors = self._logits(features)
        odds = np.exp(log_posterior)
        return odds / odds.sum(), factors

    def _logits(self, features: Features) -> tuple[Floats, Floats]:
        """Log probabilities by n-grams alone, (labels,), and factors, (factors,)."""
        outputs = self._bias.copy()
        values = np.log(features.counts.astype(np.float32)) + np.float32(1)
        edges = (0, features.chars, len(values))
        for start, end in itertools.pairwise(edges):
            if start == end:
                continue
            buckets, value = features.buckets[start:end], values[start:end]
            length = float(np.sqrt((value * value) @ self._square[buckets]))
            if length > 0:
                outputs += (value @ self._weight.take(buckets, axis=0)) / length
        labels = len(self.labels)
        return log_softmax(outputs[:labels]), outputs[labels:]

    def novelty(self, features: Features) -> float:
        """Share of character 4-grams and words that training has not seen; 1 for an empty text."""
        if not len(features.marks):
            return 1.0
        return 1.0 - float(np.count_nonzero(self._known[features.marks])) / len(features.marks)

    def decide(self, posterior: Floats, novelty: float, stage: str = "ngrams") -> CategoryScores:
        """Choose the category: the most probable label, or `general` if that is too uncertain.

        Args:
            posterior: (labels,), probabilities.
            novelty: Novelty in [0, 1]. A text with much novelty is `general`, too.
            stage: The last stage that was asked.
        """
        return choose(self.labels, posterior, novelty, stage, self.min_confidence, self.max_novelty)


def choose(
    labels: tuple[str, ...],
    posterior: Floats,
    novelty: float,
    stage: str,
    min_confidence: float,
    max_novelty: float,
) -> CategoryScores:
    """Choose the most probable label, or `general` where that is too uncertain or too new."""
    best = int(posterior.argmax())
    confidence = float(posterior[best])
    sure = confidence >= min_confidence and novelty <= max_novelty
    return CategoryScores(
        labels=labels,
        probabilities=tuple(posterior.tolist()),
        category=labels[best] if sure else GENERAL,
        confidence=confidence,
        novelty=novelty,
        stage=stage if sure else GENERAL,
    )


def _encoder_stage(artifact: Artifact, labels: int) -> EncoderStage | None:
    section = artifact.part("classifier", "encoder")
    if section is None:
        return None
    dims = section.get("dims")
    if not isinstance(dims, int) or not 1 <= dims <= 8192:
        raise ArtifactError(f"{artifact.path}: manifest, encoder: dims must be 1..8192")
    probe = artifact.tensor("encoder.probe", (dims,)).astype(np.float32)
    return EncoderStage(read_head(artifact, "encoder", labels, dims), probe)
