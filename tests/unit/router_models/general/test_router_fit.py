"""Fitting the general router's stages, on a few prompts of three subjects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from router_models.category_fit import CategoryFit
from router_models.general.categories import general_categories
from router_models.general.fit_data import OWN, SCRAPS, FitRow
from router_models.general.near_duplicates import MOST_LIKE_HELD_OUT, cosines, held_out_texts
from router_models.general.router_fit import fit
from router_models.general.training_prompt_reader import (
    CALIBRATION_FOLDER,
    read_training_prompts,
    read_unknown,
)
from router_models.labelled_prompt_reader import LabelledPrompt, prompt_files, read_prompts
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.router_artifact import save_artifact
from service.classifier.static_embedding_table import built_in_table
from service.encoder.onnx_encoder import OnnxEncoder
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts

CALIBRATION, _ = read_prompts(prompt_files([CALIBRATION_FOLDER]))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxEncoder:
    return OnnxEncoder(make_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def fitted(encoder: OnnxEncoder) -> CategoryFit:
    rows = [
        FitRow(text, subject, "en", OWN, 100 * i + j, 1.0)
        for i, subject in enumerate(SUBJECTS)
        for j, text in enumerate(prompts(subject, 30, 1))
    ]
    rows += [
        FitRow(f"{row.text} !", row.category, "en", OWN, row.origin, 0.5, True) for row in rows
    ]
    rows += [FitRow(f"zq{i}", GENERAL, "", SCRAPS, 1000 + i, 0.5) for i in range(20)]
    calibration = [
        LabelledPrompt(text, subject, "en")
        for subject in SUBJECTS
        for text in prompts(subject, 10, 2)
    ]
    calibration += [LabelledPrompt(f"zq{i}", GENERAL, "en") for i in range(30, 36)]
    return fit(rows, calibration, built_in_table(), encoder, 3, lambda _: None)


def test_fit_sorts_other_prompts_and_scraps_at_every_stage(
    fitted: CategoryFit, encoder: OnnxEncoder, tmp_path: Path
) -> None:
    manifest = {"categories": list(fitted.labels), "classifier": fitted.classifier}
    artifact = save_artifact(tmp_path / "some@1", manifest, fitted.tensors, "")
    classifier = Classifier.from_artifact(artifact, built_in_table())
    for subject in SUBJECTS:
        texts = prompts(subject, 10, 3)
        for text, vector in zip(texts, encoder.encode(texts), strict=True):
            assert classifier.classify(text).category == subject
            read = classifier.read(text, vector)
            assert classifier.decide(read.posterior, read.novelty).category == subject
    assert classifier.classify("zq77").category == GENERAL


def test_fit_measures_calibration_prompts_and_folds(fitted: CategoryFit) -> None:
    folds = fitted.metrics["folds"]
    assert folds["all"]["ngrams"]["prompts"] == 3 * 30  # neither forms nor scraps
    for found in (fitted.metrics["calibration"], folds["all"], folds[OWN]):
        assert list(found) == ["ngrams", "static", "encoder"]
        assert all(stage["accuracy"] > 0.9 for stage in found.values())


def test_calibration_prompts_have_every_category_and_known_languages() -> None:
    allowed = {*general_categories().names, GENERAL}
    assert {p.category for p in CALIBRATION} == allowed
    assert {p.language for p in CALIBRATION} == {"de", "en", "es", "fr", "it", "ja", "pt", "zh"}


@pytest.mark.parametrize("language", sorted({p.language for p in CALIBRATION}))
def test_calibration_prompts_are_near_no_held_out_and_no_fitted_prompt(language: str) -> None:
    ours = [p.prompt for p in CALIBRATION if p.language == language]
    held_out = held_out_texts(language)
    prompts = (*read_training_prompts(), *read_unknown())
    taught = [p.prompt for p in prompts if p.lang == language]
    for others in (held_out, taught):
        near = np.argwhere(cosines(ours, others) > MOST_LIKE_HELD_OUT)
        assert [(ours[i], others[j]) for i, j in near] == []
