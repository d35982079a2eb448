"""`coe router fit-categories`: fits a classifier of categories, judges it, and writes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from router_models.category_fit import (
    Judgement,
    cost_curve,
    fit_categories,
    judge,
    to_json,
    write_artifact,
)
from router_models.labelled_prompt_reader import (
    LabelledPrompt,
    fingerprints,
    prompt_files,
    read_prompts,
)
from router_models.outcome_reader import OutcomeError
from router_models.stage_fit import encode
from service.classifier.classifier import Classifier
from service.classifier.router_artifact import Artifact
from service.classifier.static_embedding_table import BUILT_IN, StaticTable
from service.encoder.onnx_encoder import OnnxEncoder
from service.models.encoder_store import require_encoder

Say = Callable[[str], None]


def run(
    *,
    prompts: Sequence[Path],
    out: Path,
    test: Sequence[Path] = (),
    calibrate: Sequence[Path] = (),
    encoder: str | None = None,
    no_static: bool = False,
    say: Say = print,
) -> Artifact:
    """Fit on `prompts`, judge on `test`, and write the artifact `out` with its card.

    `calibrate` are prompts that only set exponents, temperatures and the least confidence.

    Raises:
        OutcomeError: A file is wrong, or a test prompt is also fitted on.
        ArtifactError: The encoder or the static table can't be used.
        ModelStoreError: There is no such encoder.
    """
    files = prompt_files(prompts)
    rows, skipped = read_prompts(files)
    for line in skipped:
        say(line)
    tests: list[LabelledPrompt] = []
    if test:
        tests, skipped = read_prompts(prompt_files(test))
        for line in skipped:
            say(line)
        both = {row.prompt for row in rows} & {row.prompt for row in tests}
        if both:
            raise OutcomeError(
                f"{len(both)} test prompts are among the prompts to fit, such as "
                f"{min(both)[:60]!r}; remove them from one of the two"
            )
    judges: list[LabelledPrompt] = []
    if calibrate:
        judges, _ = read_prompts(prompt_files(calibrate))
        if both := {row.prompt for row in judges} & {row.prompt for row in [*rows, *tests]}:
            raise OutcomeError(
                f"{len(both)} prompts to calibrate are also to be fitted or tested, such as "
                f"{min(both)[:60]!r}; remove them from one of the two"
            )
    table = None if no_static else StaticTable.load(BUILT_IN)
    loaded = None if encoder is None else OnnxEncoder(require_encoder(encoder))
    say(f"{len(rows)} prompts, {len({row.category for row in rows})} categories")
    fitted = fit_categories(rows, table, loaded, calibration=judges, say=say)
    data = fingerprints([*files, *prompt_files(calibrate)] if calibrate else files)
    artifact = write_artifact(fitted, out, data, {})
    if tests:
        tested = test_metrics(artifact, table, loaded, tests)
        for stage, found in tested["stages"].items():
            say(
                f"{stage:8s} test: accuracy {100 * found['accuracy']:.1f} %, "
                f"calibration error {found['ece']:.3f}"
            )
        artifact = write_artifact(fitted, out, data, tested)
    say(f"wrote {artifact.path}")
    return artifact


def test_metrics(
    artifact: Artifact,
    table: StaticTable | None,
    encoder: OnnxEncoder | None,
    rows: Sequence[LabelledPrompt],
) -> dict[str, Any]:
    """Judge every stage of an artifact on test prompts."""
    found: dict[str, Judgement] = {"ngrams": judge(Classifier.from_artifact(artifact), rows, None)}
    if table is not None:
        found["static"] = judge(Classifier.from_artifact(artifact, table), rows, None)
    first = found["static" if table is not None else "ngrams"]
    curve = []
    if encoder is not None:
        vectors = encode(encoder, [row.prompt for row in rows])
        found["encoder"] = judge(Classifier.from_artifact(artifact, table), rows, vectors)
        curve = [
            {"when_below": p.when_below, "asked": p.asked, "accuracy": p.accuracy}
            for p in cost_curve(first, found["encoder"])
        ]
    last = list(found.values())[-1]
    return {
        "rows": len(rows),
        "stages": {stage: to_json(judgement) for stage, judgement in found.items()},
        "curve": curve,
        "confusion": last.confusion,
    }
