"""Evaluates an artifact on outcomes that it was not fitted on, for `coe router evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_models.fit_settings import Settings
from router_models.frontier_evaluation import compared_lines, default_budgets, plot, report
from router_models.outcome_reader import OutcomeError, Table, costs_of, read_outcomes
from router_models.recipe_replay import play
from router_models.router_fit import prompt_hashes, settings_from_json
from router_models.two_stage_fit import Predicted, Problem
from service.classifier.classifier import Classifier
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import Artifact, load_artifact
from service.classifier.static_embedding_table import StaticTable, built_in_table
from service.errors import ArtifactError

FOLDS = 5


def run(
    *,
    artifact: Path,
    outcomes: Sequence[Path],
    costs: Path | None,
    experts: Sequence[str] | None = None,
    budgets: Sequence[float] | None = None,
    plot_to: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluate `artifact`, and return the object that `--json` prints.

    Rows that the artifact was fitted on are left out. An artifact that was fitted on all rows is
    fitted again in folds with the same settings. Every row is then evaluated by a fit without it.

    Raises:
        OutcomeError: The outcomes can't be read.
        ArtifactError: The artifact has no map, or does not fit the outcomes.
    """
    loaded = load_artifact(artifact)
    if "map" not in loaded.manifest:
        raise ArtifactError(f"{loaded.path}: only classifies; it has no map to evaluate")
    priced = costs_of(costs, outcomes)
    if experts is None:
        known = [str(e) for e in loaded.manifest.get("experts", [])]
        experts = [e for e in known if e in priced]
        for name in set(known) - set(experts):
            say(f"{name}: no cost is given, left out")
        experts = _recorded(outcomes, priced, experts, say)
    table, skipped = read_outcomes(outcomes, priced, experts)
    for line in skipped.lines():
        say(line)
    seen = np.isin(prompt_hashes(table.prompts), loaded.tensors.get("fit.rows", np.empty(0)))
    if seen.all():
        say(
            f"all {len(table)} rows were used in the fit: "
            f"fitted again in {FOLDS} folds, each row judged by a fit that did not see it"
        )
        problem = Problem(table, _settings(loaded), static_table(loaded))
        judged, played, labels = table, problem.played, problem.labels
        predicted = problem.out_of_fold(FOLDS)
    else:
        if seen.any():
            say(f"{int(seen.sum())} of {len(table)} rows were used in the fit: not judged")
        judged = table.take(np.flatnonzero(~seen))
        found = _map(loaded, judged)
        played, labels = play(found.recipes, judged), found.categories
        predicted = predict(loaded, found, judged)
    result = report(judged, played, predicted, labels, budgets or default_budgets(judged))
    if plot_to is not None:
        plot(result, judged, plot_to)
        say(f"wrote {plot_to}")
    return result


def predict(loaded: Artifact, found: ExpertMap, table: Table) -> Predicted:
    """Return the artifact's predictions for every row, computed as the service does."""
    classifier = Classifier.from_artifact(loaded, static_table(loaded))
    posterior, quality, cost = [], [], []
    for prompt in table.prompts:
        assessment = classifier.assess(prompt)
        estimate = found.estimate(assessment)
        posterior.append(assessment.scores.probabilities)
        quality.append(estimate.quality)
        cost.append(estimate.cost)
    return Predicted(np.array(posterior), np.array(quality), np.array(cost))


def static_table(loaded: Artifact) -> StaticTable | None:
    """The static table, if the artifact has a head on it."""
    return built_in_table() if "static" in loaded.section("classifier") else None


def _map(loaded: Artifact, table: Table) -> ExpertMap:
    try:
        return ExpertMap.from_artifact(loaded).only(table.experts)
    except ValueError as error:
        raise OutcomeError(
            f"the artifact knows no recipe over {', '.join(table.experts)}; "
            f"its experts: {', '.join(map(str, loaded.manifest.get('experts', [])))}"
        ) from error


def _recorded(
    outcomes: Sequence[Path],
    priced: dict[str, float],
    experts: Sequence[str],
    say: Callable[[str], None],
) -> list[str]:
    """Return the artifact's experts that have outcomes."""
    table, _ = read_outcomes(outcomes, priced)
    missing = [e for e in experts if e not in table.experts]
    if missing:
        say(f"no outcomes of {', '.join(missing)}: left out")
    return [e for e in experts if e in table.experts]


def _settings(loaded: Artifact) -> Settings:
    try:
        return settings_from_json(dict(loaded.section("fit")))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{loaded.path}: manifest, fit: {error!r}") from error


def readable(result: dict[str, Any]) -> list[str]:
    """The result as a table."""
    best, top, any_ = result["best_single"], result["oracle"], result["random"]
    accuracy = result["category_accuracy"]
    lines = [
        *(line.strip() for line in compared_lines(result["compared"])),
        f"best single  {100 * best['score']:6.2f} @ {best['cost']:.4g}  ({best['model']})",
        f"random       {100 * any_['score']:6.2f} @ {any_['cost']:.4g}",
        f"oracle       {100 * top['score']:6.2f} @ {top['cost']:.4g}",
        f"category accuracy {'-' if accuracy is None else f'{100 * accuracy:.1f} %'}",
        "    budget      cost    score      mix    gain",
    ]
    lines += [
        f"{a['budget']:10.4g}{a['cost']:10.4g}{100 * a['score']:9.2f}{100 * a['mix_score']:9.2f}"
        f"{100 * (a['score'] - a['mix_score']):+8.2f}"
        for a in result["at"]
    ]
    return lines
