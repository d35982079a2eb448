"""Linear models on hashed n-grams: design matrices, logistic and ridge fits, and calibration.

The features come from the service (`service.classifier.hashed_ngrams`), so that fitting and serving
use the same features. scikit-learn is not needed, because a multinomial logistic regression is a
convex function for `scipy.optimize`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize, minimize_scalar

from service.classifier.hashed_ngrams import Features, FeatureSpec, Featurizer

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Features of many texts. `counts` is (rows, buckets), sparse; `marks` one array a row."""

    spec: FeatureSpec
    counts: sparse.csr_matrix
    marks: list[NDArray[np.uint32]]

    def __len__(self) -> int:
        return int(self.counts.shape[0])

    def take(self, rows: NDArray[np.int64]) -> Corpus:
        """The corpus of these rows, in this order."""
        return Corpus(self.spec, self.counts[rows], [self.marks[i] for i in rows])


def featurize(texts: Sequence[str], spec: FeatureSpec) -> Corpus:
    """Features of every text."""
    featurizer = Featurizer(spec)
    found: list[Features] = [featurizer(text) for text in texts]
    pointers = np.concatenate(([0], np.cumsum([len(f.buckets) for f in found])))
    empty = np.empty(0, dtype=np.int64)
    counts = sparse.csr_matrix(
        (
            np.concatenate([empty, *(f.counts for f in found)]).astype(np.float32),
            np.concatenate([empty, *(f.buckets for f in found)]),
            pointers,
        ),
        shape=(len(found), spec.buckets),
    )
    return Corpus(spec, counts, [f.marks for f in found])


def inverse_document_frequency(counts: sparse.csr_matrix) -> NDArray[np.float32]:
    """Smoothed idf, (buckets,): ln((1 + rows) / (1 + rows with it)) + 1, 0 where no row has it."""
    rows = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log((1 + counts.shape[0]) / (1 + rows)) + 1
    return np.where(rows > 0, idf, 0).astype(np.float32)


def design(counts: sparse.csr_matrix, idf: NDArray[np.float32]) -> sparse.csr_matrix:
    """(1 + ln count) * idf with the character and the word half each scaled to length 1.

    The same numbers as `Classifier.posterior` computes for one text.
    """
    x = counts.copy()
    x.data = (np.log(x.data) + 1).astype(np.float32) * idf[x.indices]
    half = x.shape[1] // 2
    row = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
    part = row * 2 + (x.indices >= half)
    square = np.bincount(part, weights=x.data.astype(np.float64) ** 2, minlength=2 * x.shape[0])
    length = np.sqrt(square)
    length[length == 0] = 1
    x.data = (x.data / length[part]).astype(np.float32)
    return x


def fit_logistic(
    x: sparse.csr_matrix | NDArray[np.float32],
    target: Matrix,
    *,
    l2: float,
    row_weight: Matrix | None = None,
    max_iterations: int = 150,
) -> tuple[Matrix, Matrix]:
    """Multinomial logistic regression by L-BFGS.

    `x` is (rows, buckets), sparse or dense. `target` is (rows, labels), each row a distribution.
    Minimises the weighted mean cross-entropy + l2/2 · |W|². Returns W (buckets, labels) and the
    bias (labels,), which is not penalised.
    """
    rows, columns = x.shape
    labels = target.shape[1]
    share = np.full(rows, 1 / rows) if row_weight is None else row_weight / row_weight.sum()
    if isinstance(x, np.ndarray):
        used = np.arange(columns)
        inputs, back = x, np.ascontiguousarray(x.T)
    else:
        used = np.flatnonzero(np.bincount(x.indices, minlength=columns))
        inputs = x[:, used].astype(np.float32)
        back = inputs.T.tocsr()

    def loss(flat: Matrix) -> tuple[float, Matrix]:
        weight = flat[:-labels].reshape(len(used), labels)
        logits = inputs @ weight.astype(np.float32) + flat[-labels:].astype(np.float32)
        logits -= logits.max(axis=1, keepdims=True)
        odds = np.exp(logits.astype(np.float64))
        total = odds.sum(axis=1, keepdims=True)
        cross = -(target * (logits - np.log(total))).sum(axis=1)
        error = (odds / total - target) * share[:, None]
        gradient = back @ error.astype(np.float32) + l2 * weight
        value = float(cross @ share) + l2 / 2 * float((weight * weight).sum())
        return value, np.concatenate((gradient.ravel(), error.sum(axis=0)))

    found = minimize(
        loss,
        np.zeros(len(used) * labels + labels),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "maxcor": 10},
    )
    weight = np.zeros((columns, labels))
    weight[used] = found.x[:-labels].reshape(len(used), labels)
    return weight, found.x[-labels:]


def softmax(logits: Matrix) -> Matrix:
    """Rows of probabilities."""
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def fit_temperature(
    logits: Matrix, labels: NDArray[np.int64], weight: Matrix | None = None
) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T) on held-out rows.

    Guo et al., "On Calibration of Modern Neural Networks", 2017.

    Args:
        logits: (rows, labels).
        labels: (rows,).
        weight: (rows,), how much each counts; None: alike.
    """
    rows = np.arange(len(labels))

    def loss(log_t: float) -> float:
        p = softmax(logits / np.exp(log_t))
        return float(np.average(-np.log(np.maximum(p[rows, labels], 1e-12)), weights=weight))

    return float(np.exp(minimize_scalar(loss, bounds=(-4, 2), method="bounded").x))


def calibration_error(p: Matrix, labels: NDArray[np.int64]) -> float:
    """Expected calibration error of the top label (0..1)."""
    return top_error(p.max(axis=1), p.argmax(axis=1) == labels)


def top_error(confidence: Matrix, right: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error over bins of equal width (Guo et al., 2017)."""
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    total = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            gap = abs(float(right[inside].mean()) - float(confidence[inside].mean()))
            total += float(inside.mean()) * gap
    return total


def known_bitmap(marks: Sequence[NDArray[np.uint32]], known_bits: int) -> NDArray[np.uint8]:
    """The packed bitmap of all marks seen, (2**known_bits / 8,)."""
    seen = np.zeros(1 << known_bits, dtype=np.bool_)
    for row in marks:
        seen[row] = True
    return np.packbits(seen)


def novelty(marks: Sequence[NDArray[np.uint32]], known: NDArray[np.uint8]) -> Matrix:
    """Share of each row's marks that the bitmap has not, (rows,); 1 for a row without marks."""
    seen = np.unpackbits(known)
    return np.array([1 - seen[row].mean() if len(row) else 1.0 for row in marks])
