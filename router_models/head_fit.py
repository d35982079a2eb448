"""Fits a head on vectors that follows another stage, for routers fitted on recorded outcomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router_models.linear_models import fit_logistic, fit_temperature, softmax
from router_models.stage_fit import label_means
from service.classifier.linear_heads import Head, log_softmax

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]

FOLDS = 5
# Unit vectors are stretched so that one penalty fits them and log probabilities.
_GAIN = 3.0
_HEAD_PENALTIES = (1e-4, 1e-3)
_EXPONENTS_EARLIER = (0.5, 0.75, 1.0)
_EXPONENTS_OWN = (0.25, 0.5, 0.75, 1.0)
# So many of the held-out rows are on the ordinary side of the threshold of similarity.
_ORDINARY_SHARE = 0.995


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A fitted head and what it says, with the stages before, of rows that its fit did not see.

    Attributes:
        head: The head.
        held_out: Log probabilities of the fitted rows out of fold, (rows, labels).
        calibration: Those of the calibration prompts, (prompts, labels).
    """

    head: Head
    held_out: Floats
    calibration: Floats


def fit_head(
    earlier: Floats,
    vectors: Vectors,
    y: Rows,
    fold: NDArray[np.int64],
    weight: Floats,
    calibration: tuple[Floats, Vectors, Rows] | None = None,
) -> HeadFit:
    """Fit a head on vectors alone, and join it with the earlier stage's log probabilities.

    The penalty is the one with the least cross-entropy on rows out of fold.

    Args:
        earlier: (rows, labels), log probabilities of the earlier stage, out of fold.
        vectors: (rows, dims).
        y: (rows,), the labels.
        fold: (rows,).
        weight: (rows,), weights of the rows.
        calibration: For the calibration prompts, log probabilities of the earlier stage, vectors
            and labels. Where there are none, the rows out of fold choose the exponents.
    """
    labels, dims = earlier.shape[1], vectors.shape[1]
    x = np.asarray(_GAIN * vectors, dtype=np.float32)
    target = np.eye(labels)[y]

    def held_out(l2: float) -> Floats:
        found = np.zeros_like(earlier)
        for k in range(FOLDS):
            inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            w, b = fit_logistic(x[inside], target[inside], l2=l2, row_weight=weight[inside])
            found[outside] = x[outside] @ w + b
        return found

    tried = {l2: held_out(l2) for l2 in _HEAD_PENALTIES}
    best = min(tried, key=lambda l2: _loss(tried[l2], y)[0])
    w, b = fit_logistic(x, target, l2=best, row_weight=weight)
    given = calibration if calibration is not None and len(calibration[2]) else None
    if given is None:
        before, own, truth = earlier, tried[best], y
    else:
        before, truth = given[0], given[2]
        own = np.asarray(_GAIN * given[1] @ w + b)
    temperature = _loss(own, truth)[1]
    choices = [(a, e) for a in _EXPONENTS_EARLIER for e in _EXPONENTS_OWN]
    scaled = log_softmax(own / temperature)
    a, e = min(choices, key=lambda pair: _loss(pair[0] * before + pair[1] * scaled, truth)[0])
    joint = _loss(a * before + e * scaled, truth)[1]
    means = label_means(vectors, y, labels)
    nearest = np.zeros(len(y))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = label_means(vectors[inside], y[inside], labels)
        nearest[outside] = (vectors[outside] @ part.T).max(axis=1)
    head = Head(
        weight=(_GAIN * w * e / (temperature * joint)).astype(np.float32).reshape(dims, labels),
        bias=b * e / (temperature * joint),
        earlier=np.eye(labels) * a / joint,
        means=means,
        min_similarity=float(np.quantile(nearest, 1 - _ORDINARY_SHARE)),
    )
    out_of_fold = log_softmax((a * earlier + e * log_softmax(tried[best] / temperature)) / joint)
    seen = log_softmax((a * before + e * scaled) / joint) if given is not None else earlier[:0]
    return HeadFit(head, out_of_fold, seen)


def _loss(logits: Floats, y: Rows) -> tuple[float, float]:
    """The least cross-entropy over temperatures, and that temperature."""
    temperature = fit_temperature(logits, y)
    p = softmax(logits / temperature)
    return float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean()), temperature
