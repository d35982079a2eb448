"""Fits the stages of a classifier: n-grams, a head on the static table, a head on an encoder.

Each stage is a linear model that is fitted alone, and multiplies its posterior onto that of the
stages before ("product of experts", Hinton, 2002). Prompts that the models did not see choose
temperatures, exponents and thresholds: calibration prompts of another author where there are some,
else the rows out of fold. A free matrix over the earlier stage ("stacking") was worse on prompts of
others, see `LOG.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from router_models.linear_models import (
    Corpus,
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
from service.classifier.classifier import GENERAL
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.linear_heads import PROBE_TEXT, Head, log_softmax
from service.classifier.static_embedding_table import StaticTable
from service.encoder.onnx_encoder import OnnxEncoder

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]
Logits = dict[str, Floats]
"""(texts, labels) of each stage that there is, in their order."""

NGRAMS, STATIC, ENCODER = "ngrams", "static", "encoder"
# Unit vectors are stretched, so that penalties have a usual size.
_GAIN = 3.0
_EXPONENTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
_CONFIDENCES = tuple(0.1 + 0.025 * step for step in range(23))
# So many prompts of a category are on the ordinary side of the thresholds of novelty.
_ORDINARY_SHARE = 0.995
_ENCODER_BATCH = 64


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How the stages are fitted.

    Attributes:
        spec: The n-grams.
        l2_ngrams: Penalty of the n-grams' weights.
        l2_static: Penalties to try for the head on the table; the rows out of fold choose.
        l2_encoder: The same for the head on the encoder.
        iterations: Most steps of the solver.
        folds: Into how many folds the rows are parted; 0 for none, where there are calibration
            prompts and nobody asks for figures out of fold.
        wrong_costs: What a wrong answer costs beside `general`, in right answers. It sets the least
            confidence.
        own_weight: What rows out of fold weigh in the choice of temperatures and exponents, where
            all calibration prompts weigh 1.
    """

    spec: FeatureSpec = field(default_factory=FeatureSpec)
    l2_ngrams: float = 1e-5
    l2_static: tuple[float, ...] = (1e-4, 1e-3)
    l2_encoder: tuple[float, ...] = (1e-4, 1e-3)
    iterations: int = 150
    folds: int = 5
    wrong_costs: float = 1.0
    own_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class FitSet:
    """Labelled texts.

    Attributes:
        texts: The texts.
        y: (texts,), their labels.
        weight: (texts,), how much each counts.
        origin: (texts,), texts with the same number are in the same fold.
        ordinary: (texts,), whether what is like this text is not new. Scraps are not.
        calibrates: (texts,), whether it may calibrate out of fold; None: none does.
    """

    texts: Sequence[str]
    y: Rows
    weight: Floats
    origin: Rows
    ordinary: NDArray[np.bool_]
    calibrates: NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class StageFit:
    """Fitted stages.

    Attributes:
        tensors: The artifact's tensors.
        classifier: The section `classifier` of its manifest.
        held_out: Log posteriors after each stage of the rows out of fold; empty without folds.
        calibration: Those of the calibration prompts; empty without any.
    """

    tensors: dict[str, NDArray[Any]]
    classifier: dict[str, Any]
    held_out: Logits
    calibration: Logits


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear model: weight (features, labels) and bias (labels,)."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True, slots=True)
class Joint:
    """How a stage joins those before it: log posteriors times these, (unit: nats).

    Attributes:
        earlier: Factor of the log posterior before.
        own: Factor of this stage's logits.
    """

    earlier: float
    own: float


@dataclass(frozen=True, slots=True)
class Inputs:
    """N-grams of some texts, and their vectors, (texts, dims), for each further stage."""

    corpus: Corpus
    vectors: dict[str, Vectors]


def inputs_of(
    texts: Sequence[str],
    spec: FeatureSpec,
    table: StaticTable | None,
    encoder: OnnxEncoder | None,
) -> Inputs:
    """Compute n-grams and vectors of texts."""
    vectors: dict[str, Vectors] = {}
    if table is not None:
        none = np.zeros((0, table.dims), np.float32)
        vectors[STATIC] = np.stack([table.embed(t) for t in texts]) if texts else none
    if encoder is not None:
        vectors[ENCODER] = encode(encoder, texts)
    return Inputs(featurize(texts, spec), vectors)


def encode(encoder: OnnxEncoder, texts: Sequence[str]) -> Vectors:
    """The encoder's vectors of many texts, (texts, dims)."""
    parts = [
        encoder.encode(texts[i : i + _ENCODER_BATCH]) for i in range(0, len(texts), _ENCODER_BATCH)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, encoder.dims), np.float32)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the prompts chose that the models did not see.

    Attributes:
        temperature: Of the n-grams.
        joints: How each further stage joins.
    """

    temperature: float
    joints: dict[str, Joint]

    def stages(self, logits: Logits) -> Logits:
        """Log posteriors after each stage, (texts, labels)."""
        after = log_softmax(logits[NGRAMS] / self.temperature)
        found = {NGRAMS: after}
        for name, joint in self.joints.items():
            after = log_softmax(joint.earlier * after + joint.own * logits[name])
            found[name] = after
        return found


def calibrate(logits: Logits, truth: Rows, weight: Floats | None = None) -> Calibrated:
    """Choose temperatures and exponents by prompts that the models did not see.

    Args:
        logits: Those of each stage alone.
        truth: (prompts,), the right labels.
        weight: (prompts,), how much each counts; None: alike.
    """
    temperature = fit_temperature(logits[NGRAMS], truth, weight)
    after = log_softmax(logits[NGRAMS] / temperature)
    joints = {}
    for name, own in logits.items():
        if name != NGRAMS:
            joints[name] = join(after, own, truth, weight)
            after = log_softmax(joints[name].earlier * after + joints[name].own * own)
    return Calibrated(temperature, joints)


def join(earlier: Floats, logits: Floats, truth: Rows, weight: Floats | None = None) -> Joint:
    """Choose how a stage joins, by the cross-entropy of prompts that no model saw.

    Args:
        earlier: (prompts, labels), log posteriors before it.
        logits: (prompts, labels), its own.
        truth: (prompts,), the right labels.
        weight: (prompts,), how much each counts; None: alike.
    """
    own = fit_temperature(logits, truth, weight)
    scaled = log_softmax(logits / own)
    exponent = min(_EXPONENTS, key=lambda e: _loss(earlier + e * scaled, truth, weight)[0])
    joint = _loss(earlier + exponent * scaled, truth, weight)[1]
    return Joint(1 / joint, exponent / (own * joint))


def _loss(logits: Floats, y: Rows, weight: Floats | None = None) -> tuple[float, float]:
    """The least cross-entropy over temperatures, and that temperature."""
    temperature = fit_temperature(logits, y, weight)
    p = softmax(logits / temperature)
    miss = -np.log(np.maximum(p[np.arange(len(y)), y], 1e-12))
    return float(np.average(miss, weights=weight)), temperature


def calibrate_beside(
    logits: Logits, truth: Rows, more: Logits, more_truth: Rows, more_weight: float
) -> Calibrated:
    """Choose them by calibration prompts, and by rows out of fold for a part of the weight.

    Args:
        logits: Those of each stage alone for the calibration prompts.
        truth: (prompts,), their labels.
        more: Logits for the rows.
        more_truth: (rows,), their labels.
        more_weight: What all rows weigh together, where all calibration prompts weigh 1.
    """
    if not len(more_truth) or more_weight <= 0:
        return calibrate(logits, truth)
    weight = np.repeat(
        (1 / len(truth), more_weight / len(more_truth)), (len(truth), len(more_truth))
    )
    both = {name: np.concatenate((own, more[name])) for name, own in logits.items()}
    return calibrate(both, np.concatenate((truth, more_truth)), weight)


def min_confidence(
    log_posterior: Floats, truth: Rows, general: int | None = None, wrong_costs: float = 1.0
) -> float:
    """The confidence below which a prompt had better count as `general`.

    A right answer is worth 1, and `general` is right for prompts of no category. A wrong answer
    costs `wrong_costs`; a prompt of a category that counts as `general` costs nothing.

    Args:
        log_posterior: (prompts, labels).
        truth: (prompts,), the right labels.
        general: The label of prompts of no category; None where there is none.
        wrong_costs: What a wrong answer costs.
    """
    p = np.exp(log_posterior)
    top, best = p.max(axis=1), p.argmax(axis=1)
    given_up = truth == (-1 if general is None else general)

    def worth(bar: float) -> float:
        answered = np.where(best == truth, 1.0, -wrong_costs * (best != general))
        return float(np.where(top >= bar, answered, given_up).sum())

    found: float = max(_CONFIDENCES, key=lambda bar: (worth(bar), -bar))
    return round(found, 3)


def fit_stages(
    rows: FitSet,
    labels: tuple[str, ...],
    table: StaticTable | None,
    encoder: OnnxEncoder | None,
    options: FitOptions,
    calibration: tuple[Sequence[str], Rows] | None = None,
    say: Say = print,
) -> StageFit:
    """Fit every stage that there is a table or an encoder for.

    Args:
        rows: What is fitted.
        labels: The categories. One may be `general`.
        table: The static table.
        encoder: The encoder.
        options: How.
        calibration: Prompts that choose temperatures, exponents and thresholds, and their labels.
        say: Takes lines about the progress.

    Raises:
        ValueError: There are neither folds nor calibration prompts.
    """
    if calibration is None and options.folds < 2:
        raise ValueError("without calibration prompts, at least two folds are needed")
    spec, fold = options.spec, rows.origin % max(options.folds, 1)
    inputs = inputs_of(rows.texts, spec, table, encoder)
    everything = np.arange(len(rows.y))
    out_of_fold, penalties = _out_of_fold(inputs, rows, fold, len(labels), options, say)
    idf, models = fit_models(inputs, rows, everything, len(labels), penalties, options)
    ordinary = np.flatnonzero(rows.ordinary)
    bitmap = known_bitmap([inputs.corpus.marks[i] for i in ordinary], spec.known_bits)
    if calibration is None:
        logits, truth = out_of_fold, rows.y
        strange = _strange_out_of_fold(inputs.corpus, fold, options)
        nearest = {
            name: _nearest_out_of_fold(vectors, rows.y, fold, len(labels), options.folds)
            for name, vectors in inputs.vectors.items()
        }
    else:
        texts, truth = calibration
        seen = inputs_of(texts, spec, table, encoder)
        logits = predict(seen, idf, models)
        known = np.array([labels[i] != GENERAL for i in truth])
        strange = novelty([m for m, k in zip(seen.corpus.marks, known, strict=True) if k], bitmap)
        nearest = {
            name: (vectors[known] @ label_means(
                inputs.vectors[name][ordinary], rows.y[ordinary], len(labels)
            ).T).max(axis=1)
            for name, vectors in seen.vectors.items()
        }  # fmt: skip
    chosen, held_out = calibrate_out_of_fold(logits, truth, out_of_fold, rows, options)
    say(f"chosen: {chosen}")
    after = chosen.stages(logits)
    general = labels.index(GENERAL) if GENERAL in labels else None
    # The first stages decide what counts as unsure: the thresholds are theirs.
    first = after.get(STATIC, after[NGRAMS])
    section: dict[str, Any] = {
        "features": spec.to_json(),
        "categories": list(labels),
        "calibration": {"method": "temperature", "temperature": chosen.temperature},
        "thresholds": {
            "min_confidence": min_confidence(first, truth, general, options.wrong_costs),
            "max_novelty": float(np.clip(np.quantile(strange, _ORDINARY_SHARE), 0.2, 0.95)),
        },
    }
    tensors: dict[str, NDArray[Any]] = {
        "classifier.idf": idf.astype(np.float16),
        "classifier.weight": models[NGRAMS].weight.astype(np.float16),
        "classifier.bias": models[NGRAMS].bias.astype(np.float32),
        "classifier.known": bitmap,
    }
    for name, joint in chosen.joints.items():
        vectors = inputs.vectors[name][ordinary]
        head = Head(
            weight=(joint.own * models[name].weight).astype(np.float32),
            bias=joint.own * models[name].bias,
            earlier=joint.earlier * np.eye(len(labels)),
            means=label_means(vectors, rows.y[ordinary], len(labels)),
            min_similarity=float(np.quantile(nearest[name], 1 - _ORDINARY_SHARE)),
        )
        section[name] = {"dims": head.dims, "min_similarity": head.min_similarity}
        tensors |= head_tensors(name, head)
    if table is not None:
        section[STATIC]["table_sha256"] = table.digest
    if encoder is not None:
        tensors["encoder.probe"] = encoder.encode([PROBE_TEXT])[0]
    say(f"thresholds: {section['thresholds']}")
    return StageFit(
        tensors,
        section,
        held_out,
        {} if calibration is None else after,
    )


def calibrate_out_of_fold(
    logits: Logits, truth: Rows, out_of_fold: Logits, rows: FitSet, options: FitOptions
) -> tuple[Calibrated, Logits]:
    """Temperatures and exponents, and the log posteriors of the rows out of fold.

    Rows that calibrate are judged by what the calibration prompts and the other half of them chose.
    """
    if not out_of_fold:
        return calibrate(logits, truth), {}
    if rows.calibrates is None or options.own_weight <= 0:
        chosen = calibrate(logits, truth)
        return chosen, chosen.stages(out_of_fold)
    half = (rows.origin // options.folds) % 2

    def by(mask: NDArray[np.bool_]) -> Calibrated:
        at = np.flatnonzero(mask)
        more = {name: own[at] for name, own in out_of_fold.items()}
        return calibrate_beside(logits, truth, more, rows.y[at], options.own_weight)

    parts = [by(rows.calibrates & (half != k)).stages(out_of_fold) for k in (0, 1)]
    held_out = {
        name: np.where((half == 0)[:, None], first, parts[1][name])
        for name, first in parts[0].items()
    }
    return by(rows.calibrates), held_out


def fit_models(
    inputs: Inputs,
    rows: FitSet,
    among: Rows,
    labels: int,
    penalties: dict[str, float],
    options: FitOptions,
) -> tuple[NDArray[np.float32], dict[str, Linear]]:
    """Fit each stage alone on some rows; the inverse document frequency, (buckets,), comes too."""
    target, weight = np.eye(labels)[rows.y[among]], rows.weight[among]
    counts = inputs.corpus.counts[among]
    idf = inverse_document_frequency(counts)

    def solve(x: sparse.csr_matrix | Vectors, l2: float) -> Linear:
        # A text in a script that a stage does not read has no vector there.
        read = x.any(axis=1) if isinstance(x, np.ndarray) else np.ones(len(among), np.bool_)
        return Linear(
            *fit_logistic(
                x[read],
                target[read],
                l2=l2,
                row_weight=weight[read],
                max_iterations=options.iterations,
            )
        )

    models = {NGRAMS: solve(design(counts, idf).tocsr(), options.l2_ngrams)}
    for name, l2 in penalties.items():
        found = solve(_GAIN * inputs.vectors[name][among], l2)
        models[name] = Linear(_GAIN * found.weight, found.bias)
    return idf, models


def predict(inputs: Inputs, idf: NDArray[np.float32], models: dict[str, Linear]) -> Logits:
    """The logits of each stage alone."""
    found = {
        NGRAMS: np.asarray(
            design(inputs.corpus.counts, idf) @ models[NGRAMS].weight + models[NGRAMS].bias
        )
    }
    for name, vectors in inputs.vectors.items():
        found[name] = np.asarray(vectors @ models[name].weight + models[name].bias)
    return found


def _out_of_fold(
    inputs: Inputs, rows: FitSet, fold: Rows, labels: int, options: FitOptions, say: Say
) -> tuple[Logits, dict[str, float]]:
    """Logits of each stage for rows that its fit did not see, and the penalties they choose."""
    tried = {STATIC: options.l2_static, ENCODER: options.l2_encoder}
    choices = {name: tried[name] for name in inputs.vectors}
    if options.folds < 2:
        return {}, {name: given[0] for name, given in choices.items()}
    found: dict[tuple[str, float], Floats] = {}
    turns = max([1, *(len(given) for given in choices.values())])
    for turn in range(turns):
        penalties = {name: given[min(turn, len(given) - 1)] for name, given in choices.items()}
        for k in range(options.folds):
            inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            part = Inputs(
                inputs.corpus.take(outside), {n: v[outside] for n, v in inputs.vectors.items()}
            )
            idf, models = fit_models(inputs, rows, inside, labels, penalties, options)
            for name, logits in predict(part, idf, models).items():
                key = name, penalties.get(name, options.l2_ngrams)
                found.setdefault(key, np.zeros((len(rows.y), labels)))[outside] = logits
            say(f"fold {k + 1} of {options.folds} done")
    best = {
        name: min(given, key=lambda l2, name=name: _loss(found[name, l2], rows.y)[0])  # type: ignore[misc]
        for name, given in choices.items()
    }
    chosen = {NGRAMS: found[NGRAMS, options.l2_ngrams]}
    return chosen | {name: found[name, l2] for name, l2 in best.items()}, best


def _strange_out_of_fold(corpus: Corpus, fold: Rows, options: FitOptions) -> Floats:
    strange = np.zeros(len(fold))
    for k in range(options.folds):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        seen = known_bitmap([corpus.marks[i] for i in inside], options.spec.known_bits)
        strange[outside] = novelty([corpus.marks[i] for i in outside], seen)
    return strange


def _nearest_out_of_fold(vectors: Vectors, y: Rows, fold: Rows, labels: int, folds: int) -> Floats:
    nearest = np.zeros(len(y))
    for k in range(folds):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        means = label_means(vectors[inside], y[inside], labels)
        nearest[outside] = (vectors[outside] @ means.T).max(axis=1)
    return nearest


def label_means(vectors: Vectors, y: Rows, labels: int) -> Vectors:
    """The mean vector of each label, (labels, dims), of length 1; zeros for a label without any."""
    total = np.eye(labels)[y].T @ vectors
    length = np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-9)
    return np.asarray(total / length, dtype=np.float32)


def head_tensors(name: str, head: Head) -> dict[str, NDArray[Any]]:
    """The tensors of an artifact that hold a head which follows another stage."""
    assert head.earlier is not None
    return {
        f"{name}.weight": head.weight.astype(np.float16),
        f"{name}.bias": head.bias.astype(np.float32),
        f"{name}.earlier": head.earlier.astype(np.float32),
        f"{name}.means": head.means.astype(np.float16),
    }


def measured(stages: Logits, truth: Rows) -> dict[str, dict[str, float]]:
    """Prompts, accuracy and calibration error of log posteriors after each stage."""
    found = {}
    for name, log_posterior in stages.items():
        p = np.exp(log_posterior)
        found[name] = {
            "prompts": len(truth),
            "accuracy": round(float((p.argmax(axis=1) == truth).mean()), 4),
            "ece": round(calibration_error(p, truth), 4),
        }
    return found


def figures_line(where: str, found: dict[str, dict[str, float]]) -> str:
    """The figures of `measured` as a line."""
    stages = ", ".join(
        f"{name} {100 * m['accuracy']:.1f} % (calibration error {m['ece']:.3f})"
        for name, m in found.items()
    )
    return f"{where}: {stages}"
