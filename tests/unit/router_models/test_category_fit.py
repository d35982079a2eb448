"""Fitting categories to labelled prompts, and trying a config's categories."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from router_models.category_fit import CurvePoint, Judgement, cost_curve
from router_models.cli import group
from router_models.labelled_prompt_reader import LabelledPrompt, prompt_files, read_prompts
from router_models.outcome_reader import OutcomeError
from service.classifier.classifier import Classifier
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import built_in_table
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ArtifactError
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int, seed: int) -> list[dict[str, str]]:
    return [
        {"prompt": text, "category": subject, "lang": "en"}
        for subject in SUBJECTS
        for text in prompts(subject, count, seed)
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, `mine@1` with every stage, and `plain@1` with n-grams alone."""
    root = tmp_path_factory.mktemp("fit")
    make_encoder(root / "encoder")
    write_rows(root / "fit.jsonl", rows(30, 1))
    write_rows(root / "test.jsonl", rows(8, 2))
    common = ["fit-categories", "--prompts", str(root / "fit.jsonl")]
    every = [*common, "--test", str(root / "test.jsonl"), "--encoder", str(root / "encoder")]
    for words in ([*every, "--out", str(root / "mine@1")],
                  [*common, "--no-static", "--out", str(root / "plain@1")]):  # fmt: skip
        done = CliRunner().invoke(group, words)
        assert done.exit_code == 0, done.output
    return root


def test_fitted_artifact_has_every_stage_and_a_card_with_figures(fitted: Path) -> None:
    artifact = load_artifact(fitted / "mine@1")
    stages = artifact.manifest["metrics"]["test"]["stages"]
    assert list(stages) == ["ngrams", "static", "encoder"]
    assert stages["encoder"]["accuracy"] >= 0.9
    assert stages["encoder"]["by_language"] == {"en": stages["encoder"]["accuracy"]}
    card = (fitted / "mine@1" / "README.md").read_text()
    assert "| below | asked | accuracy |" in card
    assert "| law |" in card
    plain = load_artifact(fitted / "plain@1")
    assert {"static", "encoder"}.isdisjoint(plain.section("classifier"))


def test_each_stage_is_optional_when_the_artifact_is_loaded(fitted: Path) -> None:
    artifact = load_artifact(fitted / "mine@1")
    vector = OnnxEncoder(fitted / "encoder").encode(["court contract"])[0]
    bare = Classifier.from_artifact(artifact)
    full = Classifier.from_artifact(artifact, built_in_table())
    assert bare.read("court contract").stage == "ngrams"
    assert full.read("court contract").stage == "static"
    for classifier in (bare, full):
        found = classifier.read("court contract", vector)
        assert found.stage == "encoder"
        assert classifier.labels[int(found.posterior.argmax())] == "law"
        assert found.posterior.sum() == pytest.approx(1)
    assert full.memory_bytes > bare.memory_bytes > 0


def test_head_knows_words_that_were_in_no_prompt(fitted: Path) -> None:
    """What n-grams can't know: "lawyer" in no row of the fit, its vector like those of law."""
    artifact = load_artifact(fitted / "mine@1")
    classifier = Classifier.from_artifact(artifact)
    text = "sue"
    vector = OnnxEncoder(fitted / "encoder").encode([text])[0]
    assert classifier.read(text).novelty >= classifier.read(text, vector).novelty


def test_artifact_of_another_table_is_refused(fitted: Path) -> None:
    artifact = load_artifact(fitted / "mine@1")
    section = dict(artifact.section("classifier"))
    section["static"] = {**section["static"], "table_sha256": "0" * 64}
    other = type(artifact)(
        artifact.path, {**artifact.manifest, "classifier": section}, artifact.tensors
    )
    assert Classifier.from_artifact(other).static is None
    with pytest.raises(ArtifactError, match="another static table"):
        Classifier.from_artifact(other, built_in_table())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"prompt": "a", "category": "x"}', '{"prompt": "a", "category": "y"}'], ":2: the same"),
        (["{"], ":1: not JSON"),
        (["[]"], ":1: a JSON object"),
        (['{"prompt": 3, "category": "x"}'], ":1: 'prompt'"),
        (['{"prompt": "a"}'], "no prompt with a category"),
    ],
)
def test_read_prompts_bad_line_is_named(tmp_path: Path, lines: list[str], said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(OutcomeError, match=said):
        read_prompts([file])


def test_read_prompts_takes_folders_gzip_and_either_name_of_the_language(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "category": "x", "lang": "de"}, {"of": "1"}])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "b", "category": "y", "language": "fr"}))
    found, skipped = read_prompts(prompt_files([tmp_path]))
    assert found == [LabelledPrompt("a", "x", "de"), LabelledPrompt("b", "y", "fr")]
    assert len(skipped) == 1
    with pytest.raises(OutcomeError, match="no such file"):
        prompt_files([tmp_path / "missing"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"test": "fit.jsonl"}, "among the prompts to fit"),
        ({"few": "y"}, "too few"),
        ({"encoder": "./nowhere"}, "there is no such folder"),
    ],
)
def test_fit_categories_wrong_input_is_one_line(
    fitted: Path, tmp_path: Path, change: dict[str, str], said: str
) -> None:
    data = rows(12, 3)
    if "few" in change:
        data.append({"prompt": "alone", "category": "y", "lang": "en"})
    words = ["fit-categories", "--prompts", str(write_rows(tmp_path / "fit.jsonl", data))]
    if "test" in change:
        words += ["--test", str(tmp_path / "fit.jsonl")]
    if "encoder" in change:
        words += ["--encoder", change["encoder"]]
    done = CliRunner().invoke(group, [*words, "--out", str(tmp_path / "x@1")])
    assert done.exit_code == 1
    assert said in done.output
    assert not (tmp_path / "x@1").exists()


def test_cost_curve_asks_more_as_the_bar_rises() -> None:
    def judged(confidence: list[float], right: list[bool]) -> Judgement:
        return Judgement(0, 0, {}, {}, {}, np.array(confidence), np.array(right))

    curve = cost_curve(
        judged([0.2, 0.6, 0.95], [False, False, True]), judged([1, 1, 1], [True] * 3)
    )
    assert curve[0] == CurvePoint(0.0, 0.0, 1 / 3)
    assert curve[-1] == CurvePoint(1.0, 1.0, 1.0)
    assert [p.asked for p in curve] == sorted(p.asked for p in curve)


def config(path: Path, encoder: Path | None) -> Path:
    categories = {
        name: {"description": words[:40], "expert": "e", "examples": prompts(name, 8, 5)}
        for name, words in SUBJECTS.items()
    }
    router = {"encoder": {"model": str(encoder)}} if encoder else {}
    data = {
        "experts": {"e": {"model": "m", "categories": ["general"]}},
        "pools": {"cpu": {"engine": "simulated"}},
        "router": router,
        "categories": categories,
    }
    path.write_text(json.dumps(data))
    return path


def test_try_shows_a_confusion_table_of_held_out_examples(fitted: Path, tmp_path: Path) -> None:
    path = config(tmp_path / "coe.yaml", fitted / "encoder")
    done = CliRunner().invoke(group, ["try", str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert list(found["stages"]) == ["static", "encoder"]
    for stage in found["stages"].values():
        assert sum(sum(row.values()) for row in stage["confusion"].values()) == 24
    assert found["stages"]["encoder"]["accuracy"] >= 0.9
    words = ["try", str(path), "--test", str(fitted / "test.jsonl")]
    lines = CliRunner().invoke(group, words).output
    assert "encoder: " in lines
    assert "% right (test)" in lines


def test_try_without_categories_says_so(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text("experts: {e: {model: m}}\npools: {cpu: {engine: simulated}}\n")
    done = CliRunner().invoke(group, ["try", str(path)])
    assert done.exit_code == 1
    assert "no `categories`" in done.output
