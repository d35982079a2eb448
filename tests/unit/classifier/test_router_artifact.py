"""Artifacts: written and read back, and refused when anything in them is off."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.classifier.built_in_artifact import encoder_for
from service.classifier.classifier import Classifier
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.router_artifact import MANIFEST, WEIGHTS, load_artifact, save_artifact
from service.classifier.static_embedding_table import table_of
from service.errors import ArtifactError

SPEC = FeatureSpec(bits=8, known_bits=8)


def manifest() -> dict[str, Any]:
    return {
        "classifier": {
            "features": SPEC.to_json(),
            "categories": ["general", "math"],
            "calibration": {"method": "temperature", "temperature": 1.5},
            "thresholds": {"min_confidence": 0.5, "max_novelty": 0.5},
        }
    }


def tensors() -> dict[str, Any]:
    return {
        "classifier.idf": np.ones(SPEC.buckets, np.float16),
        "classifier.weight": np.ones((SPEC.buckets, 2), np.float16),
        "classifier.bias": np.array([0.5, 0.0], np.float32),
        "classifier.known": np.full(32, 255, np.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny@1"
    save_artifact(path, manifest(), tensors(), "# tiny\n")
    return path


def edit(folder: Path, change: dict[str, Any]) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    found.update(change)
    (folder / MANIFEST).write_text(json.dumps(found))


def test_artifact_written_and_read_is_equal(folder: Path) -> None:
    artifact = load_artifact(folder)
    assert artifact.name == "tiny@1"
    assert (folder / "README.md").read_text() == "# tiny\n"
    scores = Classifier.from_artifact(load_artifact(folder)).classify("hello world")
    assert scores.labels == ("general", "math")
    assert scores.category == "general"
    assert sum(scores.probabilities) == pytest.approx(1)


def test_write_artifact_twice_replaces_it_and_leaves_no_other_files(folder: Path) -> None:
    save_artifact(folder, manifest(), tensors(), "# again\n")
    assert (folder / "README.md").read_text() == "# again\n"
    assert [p.name for p in folder.parent.iterdir()] == ["tiny@1"]


def test_write_artifact_over_another_folder_raises(tmp_path: Path) -> None:
    other = tmp_path / "notes@1"
    other.mkdir()
    (other / "keep.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not overwritten"):
        save_artifact(other, manifest(), tensors(), "")
    assert (other / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["tiny", "@1", "a b@1", "tiny@"])
def test_write_artifact_folder_must_be_named_with_a_version(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="<name>@<version>"):
        save_artifact(tmp_path / name, manifest(), tensors(), "")


def test_load_artifact_missing_files_raises_with_their_names(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json.*No such file"):
        load_artifact(tmp_path / "nowhere@1")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"weights\.safetensors.*No such file"):
        load_artifact(folder)


def test_load_artifact_damaged_weights_raises(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(ArtifactError, match="SHA-256"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "other"}', "null"])
def test_load_artifact_invalid_manifest_raises(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(folder)


def test_load_artifact_other_schema_version_raises(folder: Path) -> None:
    edit(folder, {"schema_version": 99})
    with pytest.raises(ArtifactError, match="schema version 99, this version reads 1"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"categories": ["a", "b", "c"]}, "shape"),
        ({"categories": ["a", "a"]}, "distinct"),
        ({"calibration": {"temperature": 0.0}}, "temperature"),
        ({"features": {**SPEC.to_json(), "bits": 9}}, "shape"),
        ({"features": {**SPEC.to_json(), "bits": 99}}, "bits"),
        ({"features": {**SPEC.to_json(), "known_bits": 9}}, "shape"),
        ({"features": {"bits": 8}}, "expected the keys"),
        ({"features": {**SPEC.to_json(), "char_orders": [0]}}, "orders"),
        ({"thresholds": {}}, "min_confidence"),
    ],
)
def test_load_artifact_inconsistent_classifier_section_raises(
    folder: Path, change: dict[str, Any], fault: str
) -> None:
    edit(folder, {"classifier": {**manifest()["classifier"], **change}})
    with pytest.raises(ArtifactError, match=fault):
        Classifier.from_artifact(load_artifact(folder))


def test_load_artifact_without_a_classifier_raises(tmp_path: Path) -> None:
    save_artifact(tmp_path / "map@1", {}, tensors(), "")
    with pytest.raises(ArtifactError, match="'classifier' is missing"):
        Classifier.from_artifact(load_artifact(tmp_path / "map@1"))


def test_load_artifact_nan_weights_raises(tmp_path: Path) -> None:
    wrong = tensors()
    wrong["classifier.bias"][0] = np.nan
    save_artifact(tmp_path / "nan@1", manifest(), wrong, "")
    with pytest.raises(ArtifactError, match="NaN"):
        Classifier.from_artifact(load_artifact(tmp_path / "nan@1"))


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 400 * "0", "1" + 5000 * "0"]
)
@pytest.mark.parametrize("place", ["bits", "edge_chars", "temperature", "max_novelty", "spare"])
def test_load_artifact_numbers_that_are_none_raise(folder: Path, number: str, place: str) -> None:
    text = (folder / MANIFEST).read_text()
    changed = re.sub(rf'"{place}": [0-9.]+', f'"{place}": {number}', text)
    if place == "spare":
        changed = text.replace("{", f'{{"spare": {number}, ', 1)
    assert changed != text
    (folder / MANIFEST).write_text(changed)
    with pytest.raises(ArtifactError, match=r"is no finite number|is too large"):
        load_artifact(folder)


def test_load_artifact_nested_too_deep_raises(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 500_000)
    with pytest.raises(ArtifactError, match="nested too deep"):
        load_artifact(folder)


@pytest.mark.parametrize("value", [-1e30, 1e30])
def test_load_artifact_weights_whose_products_are_infinite_raise(
    tmp_path: Path, value: float
) -> None:
    bad = {**tensors(), "classifier.bias": np.array([0.0, value], np.float32)}
    save_artifact(tmp_path / "bad@1", manifest(), bad, "")
    with pytest.raises(ArtifactError, match=r"beyond ±1e\+15"):
        Classifier.from_artifact(load_artifact(tmp_path / "bad@1"))


def test_load_artifact_tables_of_positions_are_bounded(folder: Path) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    found["classifier"]["features"]["edge_chars"] = 10**9
    (folder / MANIFEST).write_text(json.dumps(found))
    with pytest.raises(ArtifactError, match=r"edge_chars 16\.\.100000 are allowed"):
        Classifier.from_artifact(load_artifact(folder))


@pytest.mark.parametrize("odd", [None, [], "x", 3])
def test_load_artifact_stages_that_are_no_objects_raise(folder: Path, odd: object) -> None:
    for stage, read in (
        ("static", table_of),
        ("static", Classifier.from_artifact),
        ("encoder", partial(encoder_for, None)),
    ):
        edit(folder, {"classifier": {**manifest()["classifier"], stage: odd}})
        with pytest.raises(ArtifactError, match=f"classifier.{stage} is not an object"):
            read(load_artifact(folder))
    edit(folder, {"classifier": {**manifest()["classifier"], "encoder": {"model": odd or ""}}})
    if odd != "x":
        with pytest.raises(ArtifactError, match="must be a name"):
            encoder_for(None, load_artifact(folder))
