"""The classifier: what kind of prompt is this? Owns posterior, confidence and novelty.

A multinomial logistic model over hashed n-grams (`features`), calibrated by a
temperature found on held-out rows. It needs no accelerator and takes well
under a millisecond, so it runs on the event loop.
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
    """All that the linear model says of one prompt: its category scores and its factors.

    `factors` (factors,) estimate how hard the prompt is for which experts; an
    artifact that only classifies has none of them.
    """

    scores: CategoryScores
    factors: Floats


class Classifier:
    """Text to `CategoryScores`. Immutable, so it may be shared by threads."""

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
        """Hold the arrays of a fitted classifier.

        `idf` is (buckets,), `weight` (buckets, labels), `bias` (labels,); `known` is the bitmap of
        seen marks, packed by `numpy.packbits`, (2**known_bits / 8,). `factor_weight` is (buckets,
        factors), `factor_bias` (factors,).
        """
        self.labels = labels
        self.spec = spec
        self.min_confidence = min_confidence
        self.max_novelty = max_novelty
        self._featurizer = Featurizer(spec)
        scale = np.asarray(idf, dtype=np.float32)
        self._square = scale * scale
        # Inverse document frequency and temperature are folded in once, and the
        # factors stand beside the labels, so that one pass over the n-grams does both.
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
        """The classifier of the artifact folder at `path`. Raises ArtifactError."""
        return cls.from_artifact(load_artifact(path))

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> Classifier:
        """The classifier of an artifact already read. Raises ArtifactError."""
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
        """Bytes of the arrays held."""
        arrays = (self._square, self._weight, self._bias, self._known)
        return sum(array.nbytes for array in arrays)

    def features(self, text: str) -> Features:
        """The features this classifier reads; time is bounded whatever the text's length."""
        return self._featurizer(text)

    def classify(self, text: str) -> CategoryScores:
        """Posterior over `labels` for one text; any `str` is taken, the empty one too."""
        return self.assess(text).scores

    def assess(self, text: str) -> Assessment:
        """Posterior and factors of one text; any `str` is taken, the empty one too."""
        features = self._featurizer(text)
        posterior, factors = self.infer(features)
        return Assessment(self.decide(posterior, self.novelty(features)), factors)

    def infer(self, features: Features) -> tuple[Floats, Floats]:
        """Calibrated probabilities, (labels,), that sum to 1, and factors, (factors,)."""
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
        """Share of the character 4-grams and words not seen in training; 1 if there are none."""
        if not len(features.marks):
            return 1.0
        return 1.0 - float(np.count_nonzero(self._known[features.marks])) / len(features.marks)

    def decide(self, posterior: Floats, novelty: float) -> CategoryScores:
        """The posterior with the label to act on: `general` where unsure or far from training."""
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
