"""Fits a classifier of categories to labelled prompts, judges it, and writes it with its card."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.labelled_prompt_reader import LabelledPrompt
from router_models.linear_models import top_error
from router_models.outcome_reader import OutcomeError
from router_models.stage_fit import (
    FitOptions,
    FitSet,
    Say,
    Vectors,
    figures_line,
    fit_stages,
    measured,
)
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.router_artifact import Artifact, save_artifact
from service.classifier.static_embedding_table import StaticTable
from service.encoder.onnx_encoder import OnnxEncoder

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

FOLDS = 5


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
    calibration: Sequence[LabelledPrompt] = (),
    say: Say = print,
) -> CategoryFit:
    """Fit every stage that there is a table or an encoder for.

    Args:
        rows: The prompts to fit.
        table: The static table.
        encoder: The encoder.
        calibration: Prompts that calibrate the stages and choose their exponents. Those of other
            categories are left out. Without any, the folds of `rows` do.
        say: Takes lines about the progress.

    Raises:
        OutcomeError: There are fewer than two categories, or one has too few prompts.
    """
    texts = [row.prompt for row in rows]
    labels = tuple(sorted({row.category for row in rows}))
    y = np.array([labels.index(row.category) for row in rows])
    _check(labels, y)
    judges = [row for row in calibration if row.category in labels]
    fitted = fit_stages(
        FitSet(
            texts,
            y,
            balance(y),
            np.array([zlib.crc32(t.encode("utf-8", "replace")) for t in texts]),
            np.ones(len(y), np.bool_),
        ),
        labels,
        table,
        encoder,
        FitOptions(folds=FOLDS),
        ([row.prompt for row in judges], np.array([labels.index(row.category) for row in judges]))
        if judges
        else None,
        lambda _: None,
    )
    stages = measured(fitted.held_out, y)
    say(figures_line("held out", stages))
    metrics = {
        "rows": len(rows),
        "held_out": f"{FOLDS}-fold",
        "stages": stages,
        "categories": {label: {"rows": int((y == i).sum())} for i, label in enumerate(labels)},
    }
    return CategoryFit(labels, fitted.tensors, fitted.classifier, metrics)


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
        ece=top_error(sure[known], (np.array(top) == truth)[known]),
        by_category={c: float(right[truth == c].mean()) for c in sorted(set(truth.tolist()))},
        by_language={
            n: float(right[languages == n].mean()) for n in sorted(set(languages.tolist())) if n
        },
        confusion=confusion,
        confidence=sure,
        right=right,
    )


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
