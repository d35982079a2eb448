"""Fitting the general router's stages, on a few prompts of three subjects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from router_models.category_fit import CategoryFit
from router_models.general.categories import general_categories
from router_models.general.fit_data import OWN, SCRAPS, FitRow
from router_models.general.held_out_prompts import held_out_prompts
from router_models.general.router_fit import CALIBRATION_FOLDER, fit, join, min_confidence
from router_models.general.training_prompt_reader import read_prompts as read_training_prompts
from router_models.labelled_prompt_reader import LabelledPrompt, prompt_files, read_prompts
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.linear_heads import log_softmax
from service.classifier.router_artifact import save_artifact
from service.classifier.static_embedding_table import built_in_table
from service.encoder.onnx_encoder import OnnxEncoder
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts
from tests.unit.router_models.general.test_training_prompt_reader import (
    MOST_LIKE_HELD_OUT,
    _cosines,
)

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
    assert folds["prompts"] == 3 * 30  # neither forms nor scraps
    for found in (fitted.metrics["calibration"], folds["all"], folds[OWN]):
        assert list(found) == ["ngrams", "static", "encoder"]
        assert all(stage["accuracy"] > 0.9 for stage in found.values())


def _logits(sure: float, right: int, wrong: int) -> NDArray[np.float64]:
    """Two labels: `right` rows that say 0, `wrong` rows that say 1."""
    return np.array([[sure, 0.0]] * right + [[0.0, sure]] * wrong)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_join_does_not_depend_on_the_scale_of_the_logits(scale: float) -> None:
    truth = np.zeros(100, dtype=np.int64)
    earlier = log_softmax(_logits(1.0, 60, 40))
    own = _logits(1.0, 80, 20)
    first, other = join(earlier, own, truth), join(earlier, scale * own, truth)
    assert np.isclose(first.own, other.own * scale, rtol=0.05)
    assert np.isclose(first.earlier, other.earlier, rtol=0.05)


def test_join_gives_calibrated_confidence() -> None:
    draw = np.random.default_rng(5)
    truth = draw.integers(0, 2, 4000)
    said = np.where(draw.random(4000) < 0.8, truth, 1 - truth)
    nothing = np.full((4000, 2), np.log(0.5))
    joint = join(nothing, 3.0 * np.eye(2)[said], truth)
    posterior = np.exp(log_softmax(joint.earlier * nothing + joint.own * 3.0 * np.eye(2)[said]))
    assert abs(posterior.max(axis=1).mean() - (said == truth).mean()) < 0.01


def test_min_confidence_lets_scraps_be_general_and_keeps_what_is_right() -> None:
    p = np.array([[0.45, 0.35, 0.2]] * 10 + [[0.3, 0.4, 0.3]] * 10)
    bar = min_confidence(np.log(p), np.array([0] * 10 + [2] * 10), general=2)
    assert 0.4 < bar <= 0.45


def test_calibration_prompts_have_every_category_and_known_languages() -> None:
    allowed = {*general_categories().names, GENERAL}
    assert {p.category for p in CALIBRATION} == allowed
    assert {p.language for p in CALIBRATION} == {"de", "en", "es", "fr", "it", "ja", "pt", "zh"}


@pytest.mark.parametrize("language", sorted({p.language for p in CALIBRATION}))
def test_calibration_prompts_are_near_no_held_out_and_no_fitted_prompt(language: str) -> None:
    ours = [p.prompt for p in CALIBRATION if p.language == language]
    held_out = [p.prompt for p in held_out_prompts() if p.language == language]
    taught = [p.prompt for p in read_training_prompts() if p.lang == language]
    for others in (held_out, taught):
        near = np.argwhere(_cosines(ours, others) > MOST_LIKE_HELD_OUT)
        assert [(ours[i], others[j]) for i, j in near] == []
