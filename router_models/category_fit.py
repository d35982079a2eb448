"""Fits a classifier of categories to labelled prompts: n-grams, static head and encoder head.

Each stage is fitted alone, and multiplies its posterior onto that of the stages before, with two
exponents and a temperature ("product of experts", Hinton, 2002). These come from prompts that the
fit did not see: the folds', or better, calibration prompts of another author. A free matrix over
the earlier stage ("stacking") was worse on prompts of others, see `LOG.md`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.labelled_prompt_reader import LabelledPrompt
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
from router_models.outcome_reader import OutcomeError
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.linear_heads import PROBE_TEXT, Head, log_softmax
from service.classifier.router_artifact import Artifact, save_artifact
from service.classifier.static_embedding_table import StaticTable
from service.encoder.onnx_encoder import OnnxEncoder

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]

FOLDS = 5
L2_NGRAMS = 1e-5
# Unit vectors are stretched so that one penalty fits them and log probabilities.
_GAIN = 3.0
_HEAD_PENALTIES = (1e-4, 1e-3)
_EXPONENTS_EARLIER = (0.5, 0.75, 1.0)
_EXPONENTS_OWN = (0.25, 0.5, 0.75, 1.0)
# So many of the held-out rows are on the ordinary side of the thresholds of similarity and novelty.
_ORDINARY_SHARE = 0.995
_ENCODER_BATCH = 64


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
    calibration: Sequence[LabelledPrompt] = (),
    say: Say = print,
) -> CategoryFit:
    """Fit every stage that there is a table or an encoder for.

    Args:
        rows: The prompts to fit.
        table: The static table.
        encoder: The encoder.
        spec: The n-grams.
        calibration: Prompts that calibrate the stages and choose their exponents. Those of other
            categories are left out. Without any, the folds of `rows` do.
        say: Takes lines about the progress.

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
    idf, w, b = ngrams(np.arange(len(rows)))
    judges = [row for row in calibration if row.category in labels]
    others = np.array([labels.index(row.category) for row in judges], dtype=np.int64)
    raw_others = np.zeros((0, len(labels)))
    if judges:
        counts = featurize([row.prompt for row in judges], spec).counts
        raw_others = np.asarray(design(counts, idf) @ w + b)
    temperature = fit_temperature(raw_others, others) if judges else fit_temperature(raw, y)
    earlier = log_softmax(raw / temperature)
    earlier_others = log_softmax(raw_others / temperature) if judges else raw_others
    metrics: dict[str, Any] = {"rows": len(rows), "held_out": f"{FOLDS}-fold", "stages": {}}
    _judge(metrics, "ngrams", earlier, y, say)
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
        seen_by = [table.embed(row.prompt) for row in judges]
        vectors_others = np.stack(seen_by) if judges else np.zeros((0, table.dims), np.float32)
        fitted = fit_head(
            earlier, vectors, y, fold, weight, (earlier_others, vectors_others, others)
        )
        earlier, earlier_others = fitted.held_out, fitted.calibration
        _judge(metrics, "static", earlier, y, say)
        section["static"] = {
            "table_sha256": table.digest,
            "dims": table.dims,
            "min_similarity": fitted.head.min_similarity,
        }
        tensors |= head_tensors("static", fitted.head)
    # The first stage decides what counts as unsure: the thresholds are its own.
    section["thresholds"] = {
        "min_confidence": min_confidence(earlier_others, others)
        if judges
        else min_confidence(earlier, y),
        "max_novelty": float(np.clip(np.quantile(strange, _ORDINARY_SHARE), 0.2, 0.95)),
    }
    if encoder is not None:
        vectors = encode(encoder, texts)
        vectors_others = (
            encode(encoder, [row.prompt for row in judges])
            if judges
            else np.zeros((0, encoder.dims), np.float32)
        )
        fitted = fit_head(
            earlier, vectors, y, fold, weight, (earlier_others, vectors_others, others)
        )
        _judge(metrics, "encoder", fitted.held_out, y, say)
        section["encoder"] = {
            "dims": encoder.dims,
            "min_similarity": fitted.head.min_similarity,
        }
        tensors |= head_tensors("encoder", fitted.head)
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


def head_tensors(name: str, head: Head) -> dict[str, NDArray[Any]]:
    """The tensors of an artifact that hold a head which follows another stage."""
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
