"""Classifies prompts: posterior over categories, confidence and novelty.

The model is a multinomial logistic regression over hashed n-grams (`features`). A temperature from
held-out rows calibrates it. It needs no accelerator and takes well under a millisecond, so it runs
on the event loop.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.classifier.artifact import Artifact, load_artifact
from service.classifier.features import Features, FeatureSpec, Featurizer
from service.errors import ArtifactError
from service.types import CategoryScores

GENERAL = "general"
"""The category of prompts that the classifier is unsure of, or that are far from all it saw."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Assessment:
    """The output of the linear model for one prompt.

    Attributes:
        scores: The scores of the categories.
        factors: (factors,), estimates of how hard the prompt is for different experts. It is empty
            if the artifact only classifies.
    """

    scores: CategoryScores
    factors: Floats


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
    ) -> None:
        """Create a classifier from fitted arrays.

        The shapes are: `idf` (buckets,), `weight` (buckets, labels), `bias` (labels,),
        `factor_weight` (buckets, factors) and `factor_bias` (factors,). `known` is the bitmap of
        seen marks, (2**known_bits / 8,), as `numpy.packbits` packs it.
        """
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
    def load(cls, path: Path | str) -> Classifier:
        """Load the classifier of the artifact folder at `path`.

        Raises:
            ArtifactError: The artifact can't be used.
        """
        return cls.from_artifact(load_artifact(path))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Classifier:
        """Create the classifier of an artifact.

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
        factors = section.get("factors", 0)
        if not isinstance(factors, int) or not 0 <= factors <= 256:
            raise ArtifactError(f"{artifact.path}: manifest, classifier: factors must be 0..256")
        return cls(
            factor_weight=artifact.tensor("classifier.factor_weight", (spec.buckets, factors))
            if factors
            else None,
            factor_bias=artifact.tensor("classifier.factor_bias", (factors,)) if factors else None,
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
        """Size of the arrays in bytes."""
        arrays = (self._square, self._weight, self._bias, self._known)
        return sum(array.nbytes for array in arrays)

    def features(self, text: str) -> Features:
        """Compute the features of a text. The time has a bound for texts of any length."""
        return self._featurizer(text)

    def classify(self, text: str) -> CategoryScores:
        """Compute the posterior over `labels` for a text. The text may be any `str`."""
        return self.assess(text).scores

    def assess(self, text: str) -> Assessment:
        """Compute posterior and factors of a text. The text may be any `str`."""
        features = self._featurizer(text)
        posterior, factors = self.infer(features)
        return Assessment(self.decide(posterior, self.novelty(features)), factors)

    def infer(self, features: Features) -> tuple[Floats, Floats]:
        """Compute calibrated probabilities, (labels,), with sum 1, and factors, (factors,)."""
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
        logits, factors = outputs[: len(self.labels)], outputs[len(self.labels) :]
        odds = np.exp(logits - logits.max())
        return odds / odds.sum(), factors

    def novelty(self, features: Features) -> float:
        """Share of character 4-grams and words that training has not seen; 1 for an empty text."""
        if not len(features.marks):
            return 1.0
        return 1.0 - float(np.count_nonzero(self._known[features.marks])) / len(features.marks)

    def decide(self, posterior: Floats, novelty: float) -> CategoryScores:
        """Choose the category: the most probable label, or `general` if that is too uncertain.

        Args:
            posterior: (labels,), probabilities.
            novelty: Novelty in [0, 1]. A text with much novelty is `general`, too.
        """
        best = int(posterior.argmax())
        confidence = float(posterior[best])
        sure = confidence >= self.min_confidence and novelty <= self.max_novelty
        return CategoryScores(
            labels=self.labels,
            probabilities=tuple(posterior.tolist()),
            category=self.labels[best] if sure else GENERAL,
            confidence=confidence,
            novelty=novelty,
        )
