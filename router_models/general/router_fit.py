"""Fits the general router: which of the everyday categories a prompt belongs to.

    python -m router_models.general.router_fit --data FOLDER --out router_models/artifacts/general@2

FOLDER holds the files that `public_data.yaml` names. The stages are fitted by
`router_models.stage_fit`. The prompts in `calibration/`, by another author than those of the fit,
choose the exponents, the temperatures and the thresholds. The held-out prompts in `test/` choose
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from router_models.category_fit import CategoryFit
from router_models.general.fit_data import SCRAPS, UNKNOWN, FitRow, Mix, fit_rows, row_weights
from router_models.general.model_card import card
from router_models.general.public_data_reader import PublicDataError, read_sources
from router_models.general.router_evaluation import judge_artifact, readable
from router_models.general.training_prompt_reader import (
    CALIBRATION_FOLDER,
    PROMPTS_FOLDER,
    UNKNOWN_FOLDER,
    PromptsError,
)
from router_models.labelled_prompt_reader import (
    LabelledPrompt,
    fingerprints,
    prompt_files,
    read_prompts,
)
from router_models.outcome_reader import OutcomeError
from router_models.stage_fit import (
    FitOptions,
    FitSet,
    Say,
    figures_line,
    fit_stages,
    measured,
)
from service.classifier.classifier import GENERAL
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.router_artifact import save_artifact
from service.classifier.static_embedding_table import MULTILINGUAL, StaticTable
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import CoeError
from service.models.encoder_store import is_encoder, require_encoder

ENCODER = "use-multilingual-v3"
OPTIONS = FitOptions(
    # Single letters carry meaning in Chinese and Japanese; sequences of five made it no better.
    spec=FeatureSpec(char_orders=(1, 2, 3, 4), trims=True),
    l2_ngrams=1e-5,
    l2_static=(3e-4,),
    l2_encoder=(1e-3,),
    iterations=60,
    # Half of it leaves the calibration error in distribution at 0.05; three times as much costs
    # accuracy on other people's prompts.
    own_weight=1 / 3,
    # A prompt that nobody could sort goes to `general` at no cost, so that more of them are tried.
    wrong_costs=0.0,
)


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
    say(f"{len(rows)} rows, {len(labels)} labels")
    truth = np.array([labels.index(row.category) for row in calibration])
    fitted = fit_stages(
        FitSet(
            [row.text for row in rows],
            y,
            row_weights(rows),
            np.array([row.origin for row in rows]),
            np.array([row.category != GENERAL for row in rows]),
            plain_rows(rows),
        ),
        labels,
        table,
        encoder,
        replace(OPTIONS, folds=folds),
        ([row.prompt for row in calibration], truth),
        say,
    )
    metrics: dict[str, Any] = {
        "rows": len(rows),
        "calibration": measured(fitted.calibration, truth),
    }
    say(figures_line("out of distribution, prompts that calibrate", metrics["calibration"]))
    if fitted.held_out:
        metrics["folds"] = {"folds": folds}
        for source, here in _judged(rows).items():
            found = measured({n: p[here] for n, p in fitted.held_out.items()}, y[here])
            metrics["folds"][source] = found
            say(figures_line(f"in distribution, {folds} folds, {source}", found))
    return CategoryFit(labels, fitted.tensors, fitted.classifier, metrics)


def named(section: dict[str, Any], encoder: str) -> dict[str, Any]:
    """Note the name of the catalogue's encoder that the artifact was fitted with."""
    if not is_encoder(encoder):
        return section
    return {**section, "encoder": {**section["encoder"], "model": encoder}}


def plain_rows(rows: Sequence[FitRow]) -> NDArray[np.bool_]:
    """Which rows are prompts as they were written, (rows,): no forms, and no scraps."""
    sources = np.array([row.source for row in rows])
    return np.asarray(
        ~np.array([row.is_form for row in rows]) & ~np.isin(sources, (SCRAPS, UNKNOWN))
    )


def _judged(rows: Sequence[FitRow]) -> dict[str, NDArray[np.int64]]:
    """The rows that are judged out of fold: no forms, and no scraps."""
    sources, plain = np.array([row.source for row in rows]), plain_rows(rows)
    found = {"all": np.flatnonzero(plain)}
    return found | {
        name: np.flatnonzero(plain & (sources == name))
        for name in sorted(set(sources[plain].tolist()))
    }


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
        table = StaticTable.load(MULTILINGUAL)
        rows = fit_rows(data, Mix(), seed)
        calibration, _ = read_prompts(prompt_files([CALIBRATION_FOLDER]))
        fitted = fit(rows, calibration, table, loaded, folds, click.echo)
        files = prompt_files([PROMPTS_FOLDER, UNKNOWN_FOLDER, CALIBRATION_FOLDER])
        manifest: dict[str, Any] = {
            "categories": list(fitted.labels),
            "classifier": named(fitted.classifier, encoder),
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
