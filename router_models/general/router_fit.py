"""Fits the general router: which of the everyday categories a prompt belongs to.

    python -m router_models.general.router_fit --data FOLDER --out router_models/artifacts/general@1

FOLDER holds the files that `public_data.yaml` names. Three linear models are fitted apart, on
hashed n-grams, on the static table and on a sentence encoder, and join as a product of posteriors.
The prompts in `calibration/`, by another author than those of the fit, choose the exponents, the
temperatures and the thresholds. The held-out prompts in `test/` choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from router_models.category_fit import CategoryFit, encode, head_tensors, label_means
from router_models.general.fit_data import (
    SCRAPS,
    FitRow,
    Mix,
    fit_rows,
    row_weights,
)
from router_models.general.model_card import card
from router_models.general.public_data_reader import PublicDataError, read_sources
from router_models.general.router_evaluation import judge_artifact, readable
from router_models.general.training_prompt_reader import PROMPTS_FOLDER, PromptsError
from router_models.labelled_prompt_reader import (
    LabelledPrompt,
    fingerprints,
    prompt_files,
    read_prompts,
)
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
from router_models.outcome_reader import OutcomeError
from service.classifier.classifier import GENERAL
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.linear_heads import PROBE_TEXT, Head, log_softmax
from service.classifier.router_artifact import save_artifact
from service.classifier.static_embedding_table import BUILT_IN, StaticTable
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import CoeError
from service.models.encoder_store import require_encoder

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]
Say = Callable[[str], None]

CALIBRATION_FOLDER = Path(__file__).with_name("calibration")
ENCODER = "all-minilm-l6-v2"
# Single letters carry meaning in Chinese and Japanese; sequences of five made it no better.
SPEC = FeatureSpec(char_orders=(1, 2, 3, 4), trims=True)
L2_NGRAMS, L2_STATIC, L2_ENCODER = 1e-5, 3e-4, 1e-3
# Unit vectors are stretched, so that penalties have a usual size.
_GAIN = 3.0
# Fits with more looked no better on the calibration prompts; nobody has compared it cleanly.
_ITERATIONS = 60
_EXPONENTS = (0.3, 0.5, 0.7, 1.0, 1.4)
_CONFIDENCES = tuple(0.1 + 0.025 * step for step in range(21))
# So many calibration prompts of a category are on the ordinary side of the thresholds.
_ORDINARY_SHARE = 0.995


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
    """The inputs of all stages for some texts.

    Attributes:
        corpus: Their n-grams.
        static: (texts, dims).
        encoded: (texts, dims); zeros where the encoder was not asked.
    """

    corpus: Corpus
    static: Vectors
    encoded: Vectors

    def take(self, rows: Rows) -> Inputs:
        """The inputs of these rows, in this order."""
        return Inputs(self.corpus.take(rows), self.static[rows], self.encoded[rows])


def inputs_of(
    texts: Sequence[str], table: StaticTable, encoder: OnnxEncoder, asked: NDArray[np.bool_]
) -> Inputs:
    """Compute n-grams and vectors of texts; the encoder is asked for some, (texts,)."""
    encoded = np.zeros((len(texts), encoder.dims), np.float32)
    encoded[asked] = encode(encoder, [t for t, a in zip(texts, asked, strict=True) if a])
    return Inputs(featurize(texts, SPEC), np.stack([table.embed(t) for t in texts]), encoded)


@dataclass(frozen=True, slots=True)
class Models:
    """The three linear models, and the inverse document frequency of the first, (buckets,)."""

    idf: NDArray[np.float32]
    ngrams: Linear
    static: Linear
    encoder: Linear

    def logits(self, inputs: Inputs) -> tuple[Floats, Floats, Floats]:
        """(texts, labels) of each."""
        return (
            design(inputs.corpus.counts, self.idf) @ self.ngrams.weight + self.ngrams.bias,
            inputs.static @ self.static.weight + self.static.bias,
            inputs.encoded @ self.encoder.weight + self.encoder.bias,
        )


def fit_models(inputs: Inputs, y: Rows, weight: Floats, labels: int, rows: Rows) -> Models:
    """Fit the three models on some of the rows."""
    counts = inputs.corpus.counts[rows]
    idf = inverse_document_frequency(counts)

    def solve(x: sparse.csr_matrix, among: Rows, l2: float) -> tuple[Floats, Floats]:
        target, given = np.eye(labels)[y[among]], weight[among]
        return fit_logistic(x, target, l2=l2, row_weight=given, max_iterations=_ITERATIONS)

    def head(vectors: Vectors, l2: float) -> Linear:
        given = rows[vectors[rows].any(axis=1)]
        w, b = solve(sparse.csr_matrix(_GAIN * vectors[given]), given, l2)
        return Linear(_GAIN * w, b)

    w, b = solve(design(counts, idf).tocsr(), rows, L2_NGRAMS)
    return Models(
        idf, Linear(w, b), head(inputs.static, L2_STATIC), head(inputs.encoded, L2_ENCODER)
    )


def join(earlier: Floats, logits: Floats, truth: Rows) -> Joint:
    """Choose how a stage joins, by the cross-entropy of the calibration prompts.

    Args:
        earlier: (prompts, labels), log posteriors before it.
        logits: (prompts, labels), its own.
        truth: (prompts,), the right labels.
    """
    own = fit_temperature(logits, truth)
    scaled = log_softmax(logits / own)

    def loss(exponent: float) -> tuple[float, float]:
        both = earlier + exponent * scaled
        joint = fit_temperature(both, truth)
        p = softmax(both / joint)[np.arange(len(truth)), truth]
        return float(-np.log(np.maximum(p, 1e-12)).mean()), joint

    exponent = min(_EXPONENTS, key=lambda e: loss(e)[0])
    joint = loss(exponent)[1]
    return Joint(1 / joint, exponent / (own * joint))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the calibration prompts chose.

    Attributes:
        temperature: Of the n-grams.
        static: How the static head joins.
        encoder: How the encoder's head joins.
    """

    temperature: float
    static: Joint
    encoder: Joint

    def stages(self, logits: tuple[Floats, Floats, Floats]) -> tuple[Floats, Floats, Floats]:
        """Log posteriors after each stage, (texts, labels)."""
        first = log_softmax(logits[0] / self.temperature)
        second = log_softmax(self.static.earlier * first + self.static.own * logits[1])
        third = log_softmax(self.encoder.earlier * second + self.encoder.own * logits[2])
        return first, second, third


def calibrate(logits: tuple[Floats, Floats, Floats], truth: Rows) -> Calibrated:
    """Choose temperatures and exponents by prompts that the models did not see."""
    temperature = fit_temperature(logits[0], truth)
    first = log_softmax(logits[0] / temperature)
    static = join(first, logits[1], truth)
    second = log_softmax(static.earlier * first + static.own * logits[1])
    return Calibrated(temperature, static, join(second, logits[2], truth))


def min_confidence(log_posterior: Floats, truth: Rows, general: int) -> float:
    """The least confidence that is right most often, where less counts as `general`."""
    p = np.exp(log_posterior)
    top, best = p.max(axis=1), p.argmax(axis=1)

    def right(bar: float) -> float:
        return float((np.where(top >= bar, best, general) == truth).mean())

    found: float = max(_CONFIDENCES, key=lambda bar: (right(bar), bar))
    return round(found, 3)


def fit(
    rows: Sequence[FitRow],
    calibration: Sequence[LabelledPrompt],
    table: StaticTable,
    encoder: OnnxEncoder,
    folds: int = 0,
    say: Say = print,
) -> CategoryFit:
    """Fit and calibrate all stages; with `folds` > 1 also judge them out of fold."""
    labels = tuple(sorted({row.category for row in rows}))
    y = np.array([labels.index(row.category) for row in rows])
    weight = row_weights(rows)
    say(f"{len(rows)} rows, {len(labels)} labels")
    # Forms differ in a few letters: the encoder does without them, and the fit is half as long.
    plain = np.array([not row.is_form for row in rows])
    inputs = inputs_of([row.text for row in rows], table, encoder, plain)
    models = fit_models(inputs, y, weight, len(labels), np.arange(len(rows)))
    texts = [row.prompt for row in calibration]
    seen = inputs_of(texts, table, encoder, np.ones(len(texts), bool))
    truth = np.array([labels.index(row.category) for row in calibration])
    logits = models.logits(seen)
    chosen = calibrate(logits, truth)
    say(f"calibration chose {chosen}")
    after = chosen.stages(logits)
    general = labels.index(GENERAL)
    known = truth != general
    real = np.array([row.source != SCRAPS for row in rows])
    told = real & plain
    bitmap = known_bitmap(
        [m for m, r in zip(inputs.corpus.marks, real, strict=True) if r], SPEC.known_bits
    )
    strange = novelty(seen.corpus.marks, bitmap)[known]
    metrics: dict[str, Any] = {"rows": len(rows), "calibration": _measured(after, truth, say)}
    if folds > 1:
        metrics["folds"] = out_of_fold(rows, inputs, y, weight, chosen, len(labels), folds, say)
    static = _head(
        models.static, chosen.static, inputs.static[real], y[real], seen.static[known], len(labels)
    )
    encoded = _head(
        models.encoder,
        chosen.encoder,
        inputs.encoded[told],
        y[told],
        seen.encoded[known],
        len(labels),
    )
    section = {
        "features": SPEC.to_json(),
        "categories": list(labels),
        "calibration": {"method": "temperature", "temperature": chosen.temperature},
        "static": {
            "table_sha256": table.digest,
            "dims": table.dims,
            "min_similarity": static.min_similarity,
        },
        "thresholds": {
            "min_confidence": min_confidence(after[1], truth, general),
            "max_novelty": float(np.clip(np.quantile(strange, _ORDINARY_SHARE), 0.2, 0.95)),
        },
        "encoder": {"dims": encoder.dims, "min_similarity": encoded.min_similarity},
    }
    say(f"thresholds {section['thresholds']}")
    tensors: dict[str, NDArray[Any]] = {
        "classifier.idf": models.idf.astype(np.float16),
        "classifier.weight": models.ngrams.weight.astype(np.float16),
        "classifier.bias": models.ngrams.bias.astype(np.float32),
        "classifier.known": bitmap,
        "encoder.probe": encoder.encode([PROBE_TEXT])[0],
        **head_tensors("static", static),
        **head_tensors("encoder", encoded),
    }
    return CategoryFit(labels, tensors, section, metrics)


def out_of_fold(
    rows: Sequence[FitRow],
    inputs: Inputs,
    y: Rows,
    weight: Floats,
    chosen: Calibrated,
    labels: int,
    folds: int,
    say: Say,
) -> dict[str, Any]:
    """Judge our own and public prompts by models that saw neither them nor forms of them."""
    origin = np.array([row.origin for row in rows])
    _, first = np.unique(origin, return_index=True)
    judged = np.array([i for i in first if rows[i].source != SCRAPS])
    posteriors = [np.zeros((len(rows), labels)) for _ in range(3)]
    for k in range(folds):
        inside, outside = np.flatnonzero(origin % folds != k), judged[origin[judged] % folds == k]
        models = fit_models(inputs, y, weight, labels, inside)
        after = chosen.stages(models.logits(inputs.take(outside)))
        for into, part in zip(posteriors, after, strict=True):
            into[outside] = part
        say(f"fold {k + 1} of {folds} done")
    found: dict[str, Any] = {"folds": folds, "prompts": len(judged)}
    sources = np.array([rows[i].source for i in judged])
    for source in ["all", *sorted(set(sources.tolist()))]:
        here = judged if source == "all" else judged[sources == source]
        found[source] = _measured([p[here] for p in posteriors], y[here], say)
    return found


def _measured(stages: Sequence[Floats], truth: Rows, say: Say) -> dict[str, Any]:
    found = {}
    for name, log_posterior in zip(("ngrams", "static", "encoder"), stages, strict=True):
        p = np.exp(log_posterior)
        found[name] = {
            "prompts": len(truth),
            "accuracy": round(float((p.argmax(axis=1) == truth).mean()), 4),
            "ece": round(calibration_error(p, truth), 4),
        }
    say(str(found))
    return found


def _head(
    model: Linear, joint: Joint, vectors: Vectors, y: Rows, seen: Vectors, labels: int
) -> Head:
    means = label_means(vectors, y, labels)
    nearest = (seen @ means.T).max(axis=1)
    return Head(
        weight=(joint.own * model.weight).astype(np.float32),
        bias=joint.own * model.bias,
        earlier=joint.earlier * np.eye(labels),
        means=means,
        min_similarity=float(np.quantile(nearest, 1 - _ORDINARY_SHARE)),
    )


def data_of(files: Sequence[Path], folder: Path | None) -> list[dict[str, str]]:
    """Name, SHA-256, licence and authors of every file that was read."""
    ours = [d | {"license": "Apache-2.0", "credit": "this project"} for d in fingerprints(files)]
    if folder is None:
        return ours
    found = []
    for source in read_sources():
        file = folder / source.file
        file = file if file.is_file() else folder / source.file.removesuffix(".gz")
        about = {"title": source.title, "license": source.license, "credit": source.attribution}
        found += [d | about for d in fingerprints([file])]
    return ours + found


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the public data of public_data.yaml; without it they are left out.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="NAME@VERSION folder.")
@click.option("--encoder", default=ENCODER, show_default=True, help="A folder or a stored model.")
@click.option("--folds", type=click.IntRange(0, 20), default=5, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Draws the other forms and the scraps.")
def main(data: Path | None, out: Path, encoder: str, folds: int, seed: int) -> None:
    """Fit the general router, judge it on the held-out prompts, and write the artifact OUT."""
    try:
        loaded = OnnxEncoder(require_encoder(encoder))
        table = StaticTable.load(BUILT_IN)
        rows = fit_rows(data, Mix(), seed)
        calibration, _ = read_prompts(prompt_files([CALIBRATION_FOLDER]))
        fitted = fit(rows, calibration, table, loaded, folds, click.echo)
        files = prompt_files([PROMPTS_FOLDER, CALIBRATION_FOLDER])
        manifest: dict[str, Any] = {
            "categories": list(fitted.labels),
            "classifier": fitted.classifier,
            "data": data_of(files, data),
            "rows": rows_by_source(rows),
            "metrics": fitted.metrics,
        }
        artifact = save_artifact(out, manifest, fitted.tensors, "")
        tested = judge_artifact(artifact, table, loaded)
        manifest["metrics"] = {**fitted.metrics, "test": tested}
        save_artifact(out, manifest, fitted.tensors, card(out.name, manifest))
    except (CoeError, OutcomeError, PublicDataError, PromptsError) as error:
        raise click.ClickException(str(error)) from error
    for line in readable(tested):
        click.echo(line)
    click.echo(f"wrote {out}")


def rows_by_source(rows: Sequence[FitRow]) -> dict[str, dict[str, float]]:
    """Number and weight of the rows of each source."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        here = found.setdefault(
            "forms of own" if row.is_form else row.source, {"rows": 0, "weight": 0.0}
        )
        here["rows"] += 1
        here["weight"] = round(here["weight"] + row.weight, 4)
    return found


if __name__ == "__main__":
    main()
