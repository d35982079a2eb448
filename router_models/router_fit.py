"""Fits a router artifact to recorded outcomes, and writes its card.

python -m router_models.cli fit --outcomes F --costs COSTS.json --out NAME@1
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.fit_settings import Settings
from router_models.frontier_evaluation import (
    compared_lines,
    comparison,
    default_budgets,
    report,
    with_errors,
)
from router_models.head_fit import fit_head
from router_models.linear_models import calibration_error
from router_models.outcome_reader import OutcomeError, Table, costs_of, read_outcomes
from router_models.preset_choice import (
    judge_own,
    least_costs,
    own_to_json,
    play_compared,
    preset_text,
    presets_section,
)
from router_models.stage_fit import encode, head_tensors
from router_models.two_stage_fit import Fitted, Predicted, Problem
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.linear_heads import PROBE_TEXT
from service.classifier.router_artifact import Artifact, save_artifact
from service.classifier.static_embedding_table import built_in_table
from service.encoder.onnx_encoder import OnnxEncoder
from service.models.encoder_store import require_encoder

Say = Callable[[str], None]


def run(
    *,
    outcomes: Sequence[Path],
    costs: Path | None,
    out: Path,
    experts: Sequence[str] | None = None,
    folds: int = 0,
    budgets: Sequence[float] | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    encoder: str | None = None,
    no_static: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Fit on all usable rows, write the artifact `out`, return its metrics.

    The classifier has the stages of the shipped routers: n-grams, a head on the static table unless
    `no_static`, and a head on an `encoder` where one is named. Where clusters stand for categories,
    it has n-grams alone.

    With `folds` > 1 the metrics are out of fold: every row is judged by a router fitted on the
    other folds. The encoder is asked for unsure prompts only, and is not judged.

    Raises:
        OutcomeError: The outcomes can't be used.
        ArtifactError: The static table or the encoder can't be used, or `out` is no name.
        ModelStoreError: There is no such encoder.
    """
    settings = replace(settings or Settings(), seed=seed)
    table, skipped = read_outcomes(outcomes, costs_of(costs, outcomes), experts)
    for line in skipped.lines():
        say(line)
    say(f"{len(table)} prompts, {len(table.experts)} experts")
    problem = Problem(table, settings, None if no_static else built_in_table())
    if problem.clustered:
        say(f"no categories are given: {len(problem.labels)} clusters stand for them")
        if encoder is not None:
            raise OutcomeError("--encoder: the outcomes have no categories for it to tell apart")
    loaded = None if encoder is None else OnnxEncoder(require_encoder(encoder))
    say(f"{len(problem.labels)} categories, {len(problem.played.recipes)} recipes tried")
    metrics: dict[str, Any] = {"rows": len(table)}
    if folds > 1:
        predicted, reference = problem.out_of_fold_with_reference(folds)
        metrics |= out_of_fold_metrics(problem, predicted, folds, budgets)
        compared = comparison(table, problem.played, predicted)
        every = np.ones(len(compared.rows), dtype=bool)
        results = play_compared(out.name, compared, reference[compared.rows], every)
        metrics["presets"] = own_to_json(judge_own(results, seed))
        metrics["least_costs"] = least_costs(compared)
        for line in table_lines(metrics):
            say(line)
    fitted = problem.fit(np.arange(len(table)))
    data = [
        {"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in [*outcomes, *([costs] if costs is not None else [])]
    ]
    artifact = write(problem, fitted, out, data, metrics, loaded)
    say(f"wrote {artifact.path}: {len(fitted.map.kept)} recipes kept")
    return metrics


def out_of_fold_metrics(
    problem: Problem, predicted: Predicted, folds: int, budgets: Sequence[float] | None
) -> dict[str, Any]:
    """Accuracy, calibration and results at budgets of out-of-fold predictions."""
    table = problem.table
    budgets = budgets or default_budgets(table)
    found = report(table, problem.played, predicted, problem.labels, budgets)
    return {
        "held_out": f"{folds}-fold",
        "category_accuracy": found["category_accuracy"],
        "ece": _calibration(problem, predicted),
        "compared": found["compared"],
        "best_single": found["best_single"],
        "oracle": found["oracle"],
        "at": with_errors(table, problem.played, predicted, budgets),
    }


def _calibration(problem: Problem, predicted: Predicted) -> float | None:
    """Expected calibration error over the rows that gave their category; None without any."""
    if problem.clustered:
        return None
    given = np.flatnonzero(problem.given)
    return calibration_error(predicted.posterior[given], problem.category(given))


def table_lines(metrics: dict[str, Any]) -> list[str]:
    """Out-of-fold metrics as readable lines."""
    best, top, accuracy = metrics["best_single"], metrics["oracle"], metrics["category_accuracy"]
    lines = [
        f"out of fold ({metrics['held_out']}), {metrics['rows']} prompts:",
        *compared_lines(metrics["compared"]),
        f"  best single  {100 * best['score']:6.2f} @ {best['cost']:.4g}  ({best['model']})",
        f"  oracle       {100 * top['score']:6.2f} @ {top['cost']:.4g}",
        f"  category accuracy {'-' if accuracy is None else f'{100 * accuracy:.1f} %'}, "
        f"calibration error {'-' if metrics['ece'] is None else format(metrics['ece'], '.3f')}",
        "      budget      cost    score     ±      mix    gain     ±",
    ]
    lines += [
        f"  {a['budget']:10.4g}{a['cost']:10.4g}{100 * a['score']:9.2f}{100 * a['score_se']:6.2f}"
        f"{100 * a['mix_score']:9.2f}{100 * a['gain']:+8.2f}{100 * a['gain_se']:6.2f}"
        for a in metrics["at"]
    ]
    return lines


def prompt_hashes(prompts: Sequence[str]) -> NDArray[np.uint64]:
    """A 64-bit BLAKE2b hash of each prompt, by which `evaluate` knows rows it must not judge."""
    raw = b"".join(
        hashlib.blake2b(p.encode("utf-8", "surrogatepass"), digest_size=8).digest() for p in prompts
    )
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64)


def settings_to_json(settings: Settings) -> dict[str, Any]:
    """Settings as they stand in the manifest."""
    return {**asdict(settings), "spec": settings.spec.to_json()}


def settings_from_json(data: dict[str, Any]) -> Settings:
    """Settings of a manifest. Unknown keys of a later version are left out."""
    known = {f.name for f in fields(Settings)}
    given = {k: v for k, v in data.items() if k in known}
    given["spec"] = FeatureSpec.from_json(given["spec"])
    given["slope_penalties"] = tuple((float(a), float(b)) for a, b in given["slope_penalties"])
    if "trust_powers" in given:
        given["trust_powers"] = tuple(float(power) for power in given["trust_powers"])
    return Settings(**given)


def write(
    problem: Problem,
    fitted: Fitted,
    out: Path,
    data: list[dict[str, str]],
    metrics: dict[str, Any],
    encoder: OnnxEncoder | None = None,
) -> Artifact:
    """Write the artifact: classifier, factors, map, recipes, and hashes of the rows fitted on."""
    s, stage, found = problem.settings, fitted.stage1, fitted.map
    kernel = problem.kernel
    factors = len(stage.bias_factor)
    tensors: dict[str, NDArray[Any]] = {
        "classifier.idf": problem.idf.astype(np.float16),
        "classifier.weight": kernel.weight(fitted.train, stage.alpha_category).astype(np.float16),
        "classifier.bias": stage.bias_category.astype(np.float32),
        "classifier.factor_weight": kernel.weight(fitted.train, stage.alpha_factor).astype(
            np.float16
        ),
        "classifier.factor_bias": stage.bias_factor.astype(np.float32),
        "classifier.known": fitted.known,
        "map.prior": found.prior.astype(np.float32),
        "map.score": found.score.astype(np.float32),
        "map.count": found.count.astype(np.float32),
        "map.cost": found.cost.astype(np.float32),
        "map.reach": found.reach.astype(np.float32),
        "map.score_slope": found.score_slope.astype(np.float32),
        "map.cost_slope": found.cost_slope.astype(np.float32),
        "map.direct_score": found.direct.score.astype(np.float32),
        "map.direct_cost": found.direct.cost.astype(np.float32),
        "map.direct_reach": found.direct.reach.astype(np.float32),
        "map.direct_score_slope": found.direct.score_slope.astype(np.float32),
        "map.direct_cost_slope": found.direct.cost_slope.astype(np.float32),
        "fit.rows": prompt_hashes([problem.table.prompts[i] for i in fitted.train]),
    }
    later: dict[str, Any] = {}
    if problem.static is not None and fitted.head is not None:
        tensors |= head_tensors("static", fitted.head.head)
        later["static"] = {
            "table_sha256": problem.static.digest,
            "dims": problem.static.dims,
            "min_similarity": fitted.head.head.min_similarity,
        }
    if encoder is not None:
        tensors |= _encoder_stage(problem, fitted, encoder, later)
    manifest: dict[str, Any] = {
        "categories": list(problem.labels),
        "experts": list(problem.table.experts),
        "classifier": {
            "features": s.spec.to_json(),
            "categories": list(problem.labels),
            "factors": factors,
            "calibration": {"method": "matrix, within the weights", "temperature": 1.0},
            "thresholds": {"min_confidence": s.min_confidence, "max_novelty": fitted.max_novelty},
            **later,
        },
        "map": {
            "recipes": [problem.played.recipes[r].to_json() for r in found.kept],
            "factors": factors,
            "trust_power": found.trust_power,
            **presets_section(metrics.get("presets")),
        },
        "fit": settings_to_json(s),
        "data": data,
        "metrics": metrics,
    }
    return save_artifact(out, manifest, tensors, card(out.name, manifest, problem.table))


def _stages(classifier: Mapping[str, Any]) -> str:
    names = {"static": "the static table", "encoder": "the sentence encoder"}
    found = ["hashed character and word n-grams", *(names[k] for k in names if k in classifier)]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _encoder_stage(
    problem: Problem, fitted: Fitted, encoder: OnnxEncoder, section: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    """Fit the head on the encoder; its part of the manifest is put into `section`."""
    train = fitted.train
    vectors = encode(encoder, [problem.table.prompts[i] for i in train])
    inner = problem.fold_of(problem.settings.inner_folds, "inner")[train]
    found = fit_head(
        fitted.log_posterior, vectors, problem.category(train), inner, np.ones(len(train))
    ).head
    section["encoder"] = {"dims": encoder.dims, "min_similarity": found.min_similarity}
    return {**head_tensors("encoder", found), "encoder.probe": encoder.encode([PROBE_TEXT])[0]}


def card(name: str, manifest: dict[str, Any], table: Table) -> str:
    """The model card."""
    metrics = manifest["metrics"]
    files = "\n".join(f"| {d['file']} | `{d['sha256'][:16]}` |" for d in manifest["data"])
    judged = (
        "```\n" + "\n".join(table_lines(metrics)) + "\n```"
        if "at" in metrics
        else "Not judged out of fold: fit again with `--folds 5`."
    )
    if "presets" in metrics:
        judged += "\n\n" + preset_text(metrics["presets"], metrics.get("least_costs"))
    return f"""# {name}: which recipe is worth its price for a prompt

A router fitted by `coe router fit`: a classifier over {_stages(manifest["classifier"])}, factors
of difficulty over n-grams, and a map of {len(manifest["map"]["recipes"])} recipes
over {len(manifest["categories"])} categories.

Experts: {", ".join(table.experts)}.
Categories: {", ".join(manifest["categories"])}.

## Data

{len(table)} prompts with recorded outcomes. The artifact contains no text, only
weights, hashed n-grams and hashes of the prompts; the licence of the data is
its owner's matter.

| file | SHA-256 begins |
| --- | --- |
{files}

## Metrics

{judged}

Scores in %, ± one standard error over prompts. `mix` is the best random mixture
of single experts at the same cost.

## Limits

Scores are of the recorded experts on prompts like these. Where the category is
doubtful, or the prompt far from all of them, what the n-grams say of each recipe
without a category counts; that is its average where no n-gram is known.
"""
