"""Heads: linear layers that turn the vector of a text into a posterior over categories. Pure.

A head stands on the static table or on the encoder. It may also take the log probabilities of an
earlier stage, so that each stage adds to what is known before it ("stacking", Wolpert, 1992).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.classifier.router_artifact import Artifact
from service.errors import ArtifactError

Floats = NDArray[np.float64]
Vector = NDArray[np.floating]

PROBE_TEXT = "The encoder of a router is known by its vector of this sentence."
"""An artifact holds its encoder's vector of this text, and refuses an encoder with another one."""

MIN_PROBE_COSINE = 0.9
"""Quantised copies of one encoder agree far better than that, and other encoders far worse."""


@dataclass(frozen=True, slots=True)
class Head:
    """A calibrated linear layer.

    Attributes:
        weight: (dims, labels).
        bias: (labels,).
        earlier: (labels, labels), weights of the earlier stage's log probabilities; None where
            the head stands alone.
        means: (labels, dims), the mean vector of each label's texts, of length 1.
        min_similarity: Cosine to the nearest mean below which a text is unlike all labels.
    """

    weight: NDArray[np.float32]
    bias: Floats
    earlier: Floats | None
    means: NDArray[np.float32]
    min_similarity: float

    @property
    def dims(self) -> int:
        """Length of the vectors that it takes."""
        return int(self.weight.shape[0])

    @property
    def memory_bytes(self) -> int:
        """Size of the arrays in bytes."""
        return self.weight.nbytes + self.means.nbytes

    def log_posterior(self, vector: Vector, earlier: Floats | None = None) -> Floats:
        """Log probabilities, (labels,), for a vector, (dims,), and those of the earlier stage."""
        logits = vector @ self.weight + self.bias
        if self.earlier is not None and earlier is not None:
            logits = logits + earlier @ self.earlier
        return log_softmax(np.asarray(logits, dtype=np.float64))

    def similarity(self, vector: Vector) -> float:
        """Cosine to the nearest mean of a label, in [-1, 1]; -1 for the vector of an empty text."""
        return float((self.means @ vector).max()) if vector.any() else -1.0

    def novelty(self, vector: Vector, at_threshold: float) -> float:
        """How far a text is from all labels, in [0, 1].

        Args:
            vector: (dims,), of length 1.
            at_threshold: The novelty of a text whose similarity is `min_similarity`.
        """
        distance = (1.0 - self.similarity(vector)) / max(1.0 - self.min_similarity, 1e-6)
        return float(min(1.0, max(0.0, distance * at_threshold)))


def log_softmax(logits: Floats) -> Floats:
    """Log probabilities over the last axis, no smaller than -20."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(np.maximum(found, -20.0))


def read_head(artifact: Artifact, name: str, labels: int, dims: int) -> Head:
    """Read the head `name` of an artifact.

    Raises:
        ArtifactError: A tensor is missing or has another shape.
    """
    section = artifact.section("classifier")[name]
    try:
        min_similarity = float(section["min_similarity"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{artifact.path}: manifest, {name}: {error!r}") from error
    return Head(
        weight=artifact.tensor(f"{name}.weight", (dims, labels)).astype(np.float32),
        bias=artifact.tensor(f"{name}.bias", (labels,)).astype(np.float64),
        earlier=artifact.tensor(f"{name}.earlier", (labels, labels)).astype(np.float64),
        means=artifact.tensor(f"{name}.means", (labels, dims)).astype(np.float32),
        min_similarity=min_similarity,
    )
