"""Fits a classifier of categories to labelled prompts: n-grams, static head and encoder head.

Each stage is fitted on the log probabilities of the one before, for rows that that stage did not
see, and on its own vectors ("stacking", Wolpert, 1992). Each has a temperature from held-out rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from router_models.linear_models import (
    calibration_error,
    design,
    featurize,
    fit_logistic,
    fit_temperature,
    inverse_document_frequency,
    known_bitmap,
    novelty,
    softmax,
)
from router_models.outcomes import OutcomeError
from router_models.prompt_files import LabelledPrompt
from service.classifier.artifact import Artifact, save_artifact
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.features import FeatureSpec
from service.classifier.heads import PROBE_TEXT, Head, log_softmax
from service.classifier.static_table import StaticTable
from service.encoder.onnx_encoder import OnnxEncoder

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]

FOLDS = 5
L2_NGRAMS = 1e-5
# Unit vectors are stretched so that one penalty fits them and log probabilities.
_GAIN = 3.0
_HEAD_PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3)
# So many of the held-out rows are on the ordinary side of the thresholds of similarity and novelty.
_ORDINARY_SHARE = 0.995
_ENCODER_BATCH = 64


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A fitted head and what it says of held-out rows: log probabilities, (rows, labels)."""

    head: Head
    held_out: Floats


@dataclass(frozen=True, slots=True)
class CategoryFit:
    """A fitted classifier: the artifact's tensors and manifest, and metrics of held-out rows."""

    labels: tuple[str, ...]
    tensors: dict[str, NDArray[Any]]
    classifier: dict[str, Any]
    metrics: dict[str, Any]


def fit_categories(
    rows: Sequence[LabelledPrompt],
    table: StaticTable | None,
    encoder: OnnxEncoder | None,
    spec: FeatureSpec | None = None,
    say: Say = print,
) -> CategoryFit:
    """Fit every stage that there is a table or an encoder for.

    Raises:
        OutcomeError: There are fewer than two categories, or one has too few prompts.
    """
    spec = spec or FeatureSpec()
    texts = [row.prompt for row in rows]
    labels = tuple(sorted({row.category for row in rows}))
    y = np.array([labels.index(row.category) for row in rows])
    _check(labels, y)
    fold = np.array([zlib.crc32(t.encode("utf-8", "replace")) % FOLDS for t in texts])
    corpus = featurize(texts, spec)
    target = np.eye(len(labels))[y]
    weight = balance(y)

    def ngrams(train: Rows) -> tuple[NDArray[np.float32], Floats, Floats]:
        idf = inverse_document_frequency(corpus.counts[train])
        found = fit_logistic(
            design(corpus.counts[train], idf).tocsr(),
            target[train],
            l2=L2_NGRAMS,
            row_weight=weight[train],
        )
        return idf, *found

    raw = np.zeros((len(rows), len(labels)))
    strange = np.zeros(len(rows))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        idf, w, b = ngrams(inside)
        raw[outside] = design(corpus.counts[outside], idf) @ w + b
        seen = known_bitmap([corpus.marks[i] for i in inside], spec.known_bits)
        strange[outside] = novelty([corpus.marks[i] for i in outside], seen)
    temperature = fit_temperature(raw, y)
    earlier = log_softmax(raw / temperature)
    metrics: dict[str, Any] = {"rows": len(rows), "held_out": f"{FOLDS}-fold", "stages": {}}
    _judge(metrics, "ngrams", earlier, y, say)
    idf, w, b = ngrams(np.arange(len(rows)))
    tensors: dict[str, NDArray[Any]] = {
        "classifier.idf": idf.astype(np.float16),
        "classifier.weight": w.astype(np.float16),
        "classifier.bias": b.astype(np.float32),
        "classifier.known": known_bitmap(corpus.marks, spec.known_bits),
    }
    section: dict[str, Any] = {
        "features": spec.to_json(),
        "categories": list(labels),
        "calibration": {"method": "temperature", "temperature": temperature},
    }
    if table is not None:
        vectors = np.stack([table.embed(text) for text in texts])
        fitted = fit_head(earlier, vectors, y, fold, weight)
        earlier = fitted.held_out
        _judge(metrics, "static", earlier, y, say)
        section["static"] = {
            "table_sha256": table.digest,
            "dims": table.dims,
            "min_similarity": fitted.head.min_similarity,
        }
        tensors |= _head_tensors("static", fitted.head)
    # The first stage decides what counts as unsure: the thresholds are its own.
    section["thresholds"] = {
        "min_confidence": min_confidence(earlier, y),
        "max_novelty": float(np.clip(np.quantile(strange, _ORDINARY_SHARE), 0.2, 0.95)),
    }
    if encoder is not None:
        vectors = encode(encoder, texts)
        fitted = fit_head(earlier, vectors, y, fold, weight)
        _judge(metrics, "encoder", fitted.held_out, y, say)
        section["encoder"] = {
            "dims": encoder.dims,
            "min_similarity": fitted.head.min_similarity,
        }
        tensors |= _head_tensors("encoder", fitted.head)
        tensors["encoder.probe"] = encoder.encode([PROBE_TEXT])[0]
    metrics["categories"] = {label: {"rows": int((y == i).sum())} for i, label in enumerate(labels)}
    return CategoryFit(labels, tensors, section, metrics)


def _check(labels: tuple[str, ...], y: Rows) -> None:
    if len(labels) < 2:
        raise OutcomeError(f"at least two categories are needed; the files have {list(labels)}")
    size = np.bincount(y, minlength=len(labels))
    small = [f"{label} ({n})" for label, n in zip(labels, size, strict=True) if n < 2 * FOLDS]
    if small:
        raise OutcomeError(
            f"at least {2 * FOLDS} prompts of each category are needed; too few: {', '.join(small)}"
        )


def balance(y: Rows) -> Floats:
    """Row weights, (rows,), that bring the categories halfway to equal size."""
    size = np.bincount(y, minlength=int(y.max()) + 1)
    return np.asarray(np.sqrt(len(y) / np.maximum(size, 1))[y])


def encode(encoder: OnnxEncoder, texts: Sequence[str]) -> Vectors:
    """The encoder's vectors of many texts, (texts, dims)."""
    parts = [
        encoder.encode(texts[i : i + _ENCODER_BATCH]) for i in range(0, len(texts), _ENCODER_BATCH)
    ]
    return np.concatenate(parts)


def fit_head(
    earlier: Floats, vectors: Vectors, y: Rows, fold: NDArray[np.int64], weight: Floats
) -> HeadFit:
    """Fit a head on an earlier stage's held-out log probabilities and on vectors.

    The penalty is the one with the least cross-entropy on held-out rows.
    """
    labels, dims = earlier.shape[1], vectors.shape[1]
    x = sparse.csr_matrix(np.hstack([earlier, _GAIN * vectors]))
    target = np.eye(labels)[y]

    def held_out(l2: float) -> Floats:
        found = np.zeros_like(earlier)
        for k in range(FOLDS):
            inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            w, b = fit_logistic(x[inside], target[inside], l2=l2, row_weight=weight[inside])
            found[outside] = x[outside] @ w + b
        return found

    def loss(logits: Floats) -> float:
        p = softmax(logits / fit_temperature(logits, y))
        return float(-np.log(np.maximum(p[np.arange(len(y)), y], 1e-12)).mean())

    tried = {l2: held_out(l2) for l2 in _HEAD_PENALTIES}
    best = min(tried, key=lambda l2: loss(tried[l2]))
    temperature = fit_temperature(tried[best], y)
    w, b = fit_logistic(x, target, l2=best, row_weight=weight)
    means = label_means(vectors, y, labels)
    nearest = np.zeros(len(y))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        part = label_means(vectors[inside], y[inside], labels)
        nearest[outside] = (vectors[outside] @ part.T).max(axis=1)
    head = Head(
        weight=(_GAIN * w[labels:] / temperature).astype(np.float32).reshape(dims, labels),
        bias=b / temperature,
        earlier=w[:labels] / temperature,
        means=means,
        min_similarity=float(np.quantile(nearest, 1 - _ORDINARY_SHARE)),
    )
    return HeadFit(head, log_softmax(tried[best] / temperature))


def label_means(vectors: Vectors, y: Rows, labels: int) -> Vectors:
    """The mean vector of each label, (labels, dims), of length 1."""
    total = np.eye(labels)[y].T @ vectors
    length = np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
    return np.asarray(total / length, dtype=np.float32)


def min_confidence(log_posterior: Floats, y: Rows) -> float:
    """The confidence, in steps of 0.05, from which the top label is more often right than wrong."""
    p = np.exp(log_posterior)
    top, right = p.max(axis=1), p.argmax(axis=1) == y
    for low in np.arange(0.2, 0.6, 0.05):
        here = (top >= low) & (top < low + 0.1)
        if here.sum() < 20 or right[here].mean() >= 0.5:
            return round(float(low), 2)
    return 0.6


def _judge(metrics: dict[str, Any], stage: str, held_out: Floats, y: Rows, say: Say) -> None:
    p = np.exp(held_out)
    accuracy = float((p.argmax(axis=1) == y).mean())
    error = calibration_error(p, y)
    metrics["stages"][stage] = {"accuracy": round(accuracy, 4), "ece": round(error, 4)}
    say(f"{stage:8s} held out: accuracy {100 * accuracy:.1f} %, calibration error {error:.3f}")


def _head_tensors(name: str, head: Head) -> dict[str, NDArray[Any]]:
    assert head.earlier is not None
    return {
        f"{name}.weight": head.weight.astype(np.float16),
        f"{name}.bias": head.bias.astype(np.float32),
        f"{name}.earlier": head.earlier.astype(np.float32),
        f"{name}.means": head.means.astype(np.float16),
    }


@dataclass(frozen=True, slots=True)
class Judgement:
    """What an artifact says of test prompts, up to one stage.

    Attributes:
        accuracy: Share of prompts whose category is right; `general` is right for prompts of it.
        ece: Expected calibration error of the most probable label.
        by_category: Accuracy of each category.
        by_language: Accuracy of each language.
        confusion: Prompts of each category by the category that they were given.
        confidence: (prompts,), of the first stage.
        right: (prompts,), whether each is right.
    """

    accuracy: float
    ece: float
    by_category: dict[str, float]
    by_language: dict[str, float]
    confusion: dict[str, dict[str, int]]
    confidence: Floats
    right: NDArray[np.bool_]


def judge(
    classifier: Classifier, rows: Sequence[LabelledPrompt], vectors: Vectors | None
) -> Judgement:
    """Judge a classifier on test prompts; `vectors` (rows, dims) are the encoder's."""
    confidence, top, chosen = [], [], []
    for i, row in enumerate(rows):
        found = classifier.read(row.prompt, None if vectors is None else vectors[i])
        scores = classifier.decide(found.posterior, found.novelty, found.stage)
        chosen.append(scores.category)
        # A prompt that counts as general says nothing of how sure the labels are.
        confidence.append(scores.confidence)
        top.append(scores.labels[int(np.argmax(scores.probabilities))])
    truth = np.array([row.category for row in rows])
    right = np.array(chosen) == truth
    known = np.isin(truth, classifier.labels) & (truth != GENERAL)
    sure = np.array(confidence)
    confusion: dict[str, dict[str, int]] = {}
    for want, got in zip(truth.tolist(), chosen, strict=True):
        confusion.setdefault(want, {}).setdefault(got, 0)
        confusion[want][got] += 1
    languages = np.array([row.language for row in rows])
    return Judgement(
        accuracy=float(right.mean()),
        ece=_top_error(sure[known], (np.array(top) == truth)[known]),
        by_category={c: float(right[truth == c].mean()) for c in sorted(set(truth.tolist()))},
        by_language={
            n: float(right[languages == n].mean()) for n in sorted(set(languages.tolist())) if n
        },
        confusion=confusion,
        confidence=sure,
        right=right,
    )


def _top_error(confidence: Floats, right: NDArray[np.bool_], bins: int = 15) -> float:
    which = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    total = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            gap = abs(float(right[inside].mean()) - float(confidence[inside].mean()))
            total += float(inside.mean()) * gap
    return total


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Accuracy where the encoder is asked below a confidence: `asked` is the share of prompts."""

    when_below: float
    asked: float
    accuracy: float


def cost_curve(first: Judgement, second: Judgement) -> list[CurvePoint]:
    """Accuracy against the share of prompts that reach the encoder."""
    points = []
    for bar in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.01):
        asks = first.confidence < bar
        right = np.where(asks, second.right, first.right)
        points.append(CurvePoint(min(bar, 1.0), float(asks.mean()), float(right.mean())))
    return points


def write_artifact(
    fitted: CategoryFit, out: Path, data: list[dict[str, str]], tested: dict[str, Any]
) -> Artifact:
    """Write the artifact and its card."""
    metrics = fitted.metrics | ({"test": tested} if tested else {})
    manifest = {
        "categories": list(fitted.labels),
        "classifier": fitted.classifier,
        "data": data,
        "metrics": metrics,
    }
    return save_artifact(out, manifest, fitted.tensors, card(out.name, manifest))


def card(name: str, manifest: dict[str, Any]) -> str:
    """The model card."""
    metrics = manifest["metrics"]
    thresholds = manifest["classifier"]["thresholds"]
    stages = "\n".join(
        f"| {stage} | {100 * m['accuracy']:.1f} % | {m['ece']:.3f} |"
        for stage, m in metrics["stages"].items()
    )
    files = "\n".join(f"| {d['file']} | `{d['sha256'][:16]}` |" for d in manifest["data"])
    sizes = ", ".join(f"{c} {m['rows']}" for c, m in metrics["categories"].items())
    return f"""# {name}: which category a prompt belongs to

Fitted by `coe router fit --prompts`: a logistic model over hashed n-grams, then heads on the
static table and on a sentence encoder, each where the fit had one. Below a confidence of
{thresholds["min_confidence"]} a prompt counts as `general`, as does one whose n-grams are new
(novelty above {thresholds["max_novelty"]:.2f}) and whose meaning is far from every category.

Prompts of each category: {sizes}.

## Data

The artifact holds weights and hashed n-grams, and no text. The licence of the data is its owner's
matter.

| file | SHA-256 begins |
| --- | --- |
{files}

## Metrics

{metrics["held_out"]} over {metrics["rows"]} prompts; each stage with those before it:

| stage | accuracy | calibration error |
| --- | --- | --- |
{stages}
{_tested(metrics["test"]) if "test" in metrics else ""}"""


def _tested(test: dict[str, Any]) -> str:
    stages: dict[str, dict[str, Any]] = test["stages"]
    head = _row("", stages) + "\n| --- |" + " --- |" * len(stages)
    found = stages.values()
    lines = [
        _row("accuracy", [f"{100 * stage['accuracy']:.1f} %" for stage in found]),
        _row("calibration error", [f"{stage['ece']:.3f}" for stage in found]),
    ]
    for title in ("by_language", "by_category"):
        for name in next(iter(found))[title]:
            lines.append(_row(name, [f"{100 * stage[title][name]:.0f} %" for stage in found]))
    curve = "\n".join(
        f"| {p['when_below']:.2f} | {100 * p['asked']:.0f} % | {100 * p['accuracy']:.1f} % |"
        for p in test.get("curve", [])
    )
    asked = (
        "\nWhere the encoder is asked below a confidence of the first stage:\n\n"
        f"| below | asked | accuracy |\n| --- | --- | --- |\n{curve}\n"
        if curve
        else ""
    )
    confusion = "\n".join(
        _row(want, [", ".join(f"{got} {n}" for n, got in _ranked(row))])
        for want, row in test["confusion"].items()
    )
    return f"""
On {test["rows"]} test prompts that were not fitted on:

{head}
{chr(10).join(lines)}
{asked}
What the last stage gave the prompts of each category:

| category | given |
| --- | --- |
{confusion}
"""


def _row(name: str, cells: Iterable[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _ranked(row: dict[str, int]) -> list[tuple[int, str]]:
    return sorted(((n, name) for name, n in row.items()), reverse=True)


def to_json(judgement: Judgement) -> dict[str, Any]:
    """A judgement as it stands in the manifest."""
    return {
        "accuracy": round(judgement.accuracy, 4),
        "ece": round(judgement.ece, 4),
        "by_category": {k: round(v, 4) for k, v in judgement.by_category.items()},
        "by_language": {k: round(v, 4) for k, v in judgement.by_language.items()},
    }
