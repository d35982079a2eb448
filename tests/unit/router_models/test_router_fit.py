"""Fit, write, load, judge: on made-up outcomes where the right choice is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import sparse

from router_models import evaluate_command, router_fit
from router_models.cli import group
from router_models.expert_map_fit import shrunk_cells
from router_models.fit_settings import Settings
from router_models.linear_models import calibration_error, design, featurize, fit_logistic, softmax
from router_models.outcome_reader import read_outcomes
from router_models.ridge_regression import TextKernel
from router_models.two_stage_fit import Problem
from service.classifier.artifact_presets import presets_of
from service.classifier.classifier import Classifier
from service.classifier.expert_map import ExpertMap
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.linear_heads import PROBE_TEXT
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import built_in_table
from service.config.router_presets import PresetsConfig
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ArtifactError
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts

COSTS = {"small": 1.0, "maths": 2.0, "large": 20.0}
WORDS = {"sums": "add cows number total", "tales": "dragon castle king story"}
SETTINGS = Settings(spec=FeatureSpec(bits=10, known_bits=14))


def rows(count: int, seed: int, categories: bool = True) -> list[dict[str, Any]]:
    """`maths` is always right on sums, `small` on easy tales, `large` nearly always."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        category = ("sums", "tales")[i % 2]
        hard = bool(rng.random() < 0.5)
        words = rng.choice(WORDS[category].split(), 4)
        right = {
            "small": category == "tales" and not hard,
            "maths": category == "sums",
            "large": rng.random() < 0.9,
        }
        made.append(
            {
                "id": f"{seed}/{i}",
                "prompt": " ".join([*words, "puzzling" if hard else "plain", f"x{i}q{seed}"]),
                "outcomes": {
                    name: {"score": int(ok), "answer": "A" if ok else rng.choice(list("BCD"))}
                    for name, ok in right.items()
                },
            }
            | ({"category": category} if categories else {})
        )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit")
    for name, made in {
        "train.jsonl": rows(240, 1),
        "test.jsonl": rows(120, 2),
        "bare.jsonl": rows(80, 3, categories=False),
    }.items():
        (path / name).write_text("\n".join(map(json.dumps, made)))
    (path / "costs.json").write_text(json.dumps(COSTS))
    router_fit.run(
        outcomes=[path / "train.jsonl"],
        costs=path / "costs.json",
        out=path / "toy@1",
        folds=3,
        settings=SETTINGS,
        say=lambda line: None,
    )
    return path


def test_fit_artifact_loads_in_the_service(folder: Path) -> None:
    artifact = load_artifact(folder / "toy@1")
    classifier, found = Classifier.from_artifact(artifact), ExpertMap.from_artifact(artifact)
    assert set(found.experts) == set(COSTS)
    for text, category, winner in (
        ("add cows number plain", "sums", "maths"),
        ("dragon castle king plain", "tales", "small"),
        ("dragon castle king puzzling", "tales", "large"),
    ):
        assessment = classifier.assess(text)
        assert assessment.scores.category == category
        estimate = found.estimate(assessment)
        assert estimate.quality.min() >= 0
        assert estimate.quality.max() <= 1
        utility = estimate.quality - 0.01 * estimate.cost
        singles = [r for r, recipe in enumerate(found.recipes) if recipe.kind == "single"]
        best = max(singles, key=lambda r: utility[r])
        assert found.recipes[best].name == winner


def test_fit_and_service_compute_the_same_quality(folder: Path) -> None:
    table, _ = read_outcomes([folder / "train.jsonl"], COSTS)
    problem = Problem(table, SETTINGS, built_in_table())
    inside = problem.predict(problem.fit(np.arange(len(table))), np.arange(len(table)))
    artifact = load_artifact(folder / "toy@1")
    found = ExpertMap.from_artifact(artifact)
    outside = evaluate_command.predict(artifact, found, table)
    kept = [problem.played.recipes.index(recipe) for recipe in found.recipes]
    assert outside.posterior == pytest.approx(inside.posterior, abs=5e-3)
    assert outside.quality == pytest.approx(inside.quality[:, kept], abs=5e-3)
    assert outside.cost == pytest.approx(inside.cost[:, kept], abs=5e-2)


def test_fit_has_the_stages_of_shipped_routers(folder: Path, tmp_path: Path) -> None:
    """Words that no prompt of the fit has are told apart by their meaning."""
    artifact = load_artifact(folder / "toy@1")
    assert artifact.section("classifier")["static"]["table_sha256"] == built_in_table().digest
    both = Classifier.from_artifact(artifact, built_in_table())
    ngrams = Classifier.from_artifact(artifact)
    sums, tales = "multiply the digits, subtract", "a fairy tale of a princess and a wizard"
    for text, category in ((sums, "sums"), (tales, "tales")):
        found = both.read(text)
        assert found.stage == "static"
        assert both.labels[int(found.posterior.argmax())] == category
        assert found.novelty < ngrams.read(text).novelty
    router_fit.run(
        outcomes=[folder / "train.jsonl"],
        costs=folder / "costs.json",
        out=tmp_path / "bare@1",
        settings=replace(SETTINGS, inner_folds=2),
        no_static=True,
        say=lambda line: None,
    )
    assert "static" not in load_artifact(tmp_path / "bare@1").section("classifier")


def test_fit_with_an_encoder_adds_its_stage(tmp_path: Path) -> None:
    """Its head is joined with the earlier stages, and known by the encoder's vector of a text."""
    folder = make_encoder(tmp_path / "encoder")
    made = [
        {
            "id": f"{subject}/{i}",
            "prompt": text,
            "category": subject,
            "outcomes": {name: {"score": int(name == subject)} for name in SUBJECTS},
        }
        for subject in SUBJECTS
        for i, text in enumerate(prompts(subject, 40))
    ]
    path, costs = tmp_path / "rows.jsonl", tmp_path / "costs.json"
    path.write_text("\n".join(map(json.dumps, made)))
    costs.write_text(json.dumps(dict.fromkeys(SUBJECTS, 1.0)))
    words = ["fit", "--outcomes", str(path), "--costs", str(costs), "--encoder", str(folder)]
    done = CliRunner().invoke(group, [*words, "--out", str(tmp_path / "mine@1")])
    assert done.exit_code == 0, done.output
    artifact, encoder = load_artifact(tmp_path / "mine@1"), OnnxEncoder(folder)
    classifier = Classifier.from_artifact(artifact, built_in_table())
    assert classifier.encoder is not None
    assert classifier.encoder.probe == pytest.approx(encoder.encode([PROBE_TEXT])[0], abs=1e-5)
    tests = [(subject, text) for subject in SUBJECTS for text in prompts(subject, 60)[40:]]
    right = 0
    for subject, text in tests:
        found = classifier.read(text, encoder.encode([text])[0])
        assert found.stage == "encoder"
        right += classifier.labels[int(found.posterior.argmax())] == subject
    assert right > 0.9 * len(tests)
    assert "the sentence encoder" in (tmp_path / "mine@1" / "README.md").read_text()


def test_fit_with_an_encoder_needs_categories(folder: Path, tmp_path: Path) -> None:
    words = ["fit", "--outcomes", str(folder / "bare.jsonl"), "--costs", str(folder / "costs.json")]
    encoder = make_encoder(tmp_path / "encoder")
    words += ["--encoder", str(encoder), "--out", str(tmp_path / "mine@1")]
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 1
    assert "no categories" in done.output


def test_fit_unusual_prompt_gets_the_direct_estimate(folder: Path) -> None:
    artifact = load_artifact(folder / "toy@1")
    classifier, found = Classifier.from_artifact(artifact), ExpertMap.from_artifact(artifact)
    assessment = classifier.assess("我爱北京天安门" * 3)
    assert assessment.scores.category == "general"
    quality = found.estimate(assessment).quality
    direct = found.direct.score + assessment.factors @ found.direct.score_slope
    assert quality == pytest.approx(np.clip(direct, 0, 1), abs=1e-6)
    # No gram of it is known, so only collisions of hashes keep it from the mean.
    assert quality == pytest.approx(found.direct.score, abs=0.05)


def test_fit_given_categories_are_trusted(folder: Path) -> None:
    assert ExpertMap.from_artifact(load_artifact(folder / "toy@1")).trust_power == 0.0


def test_fit_languages_without_spaces_are_ordinary_where_they_were_recorded(tmp_path: Path) -> None:
    """Nearly every prompt has new 4-grams, and its category is clear all the same."""
    rng = np.random.default_rng(0)
    letters = {"x": "变压器温度最高", "y": "法院判决合同义"}
    made = [("".join(rng.choice(list(letters[k]), 12)), k) for k in ("x", "y") * 150]
    outcomes = [
        {"id": str(i), "prompt": p, "category": k, "outcomes": {"a": k == "x", "b": k == "y"}}
        for i, (p, k) in enumerate(made)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, outcomes)))
    table, _ = read_outcomes([path], {"a": 1.0, "b": 1.0})
    problem = Problem(table, replace(SETTINGS, spec=FeatureSpec(bits=10, known_bits=20)))
    train, test = np.arange(200), np.arange(200, 300)
    fitted = problem.fit(train)
    novel = problem.novelty(test, fitted.known)
    assert np.median(novel) > SETTINGS.min_max_novelty
    assert (novel <= fitted.max_novelty).mean() > 0.9
    choice = problem.predict(fitted, test).quality[:, :2].argmax(axis=1)
    assert table.score[test, choice].mean() > 0.95


def test_fit_in_folds_writes_prices_of_its_own_and_their_bounds(folder: Path) -> None:
    artifact = load_artifact(folder / "toy@1")
    presets = artifact.manifest["map"]["presets"]
    assert presets_of(PresetsConfig(), artifact).auto.point_cost == presets["auto"]["point_cost"]
    judged = artifact.manifest["metrics"]["presets"]
    for name, one in judged.items():
        assert one["point_cost"] == presets[name]["point_cost"]
    # Equal quality within a point, on folds that did not choose the price, at less than 76 %.
    assert judged["auto"]["lead"] > -1
    assert judged["auto"]["cost"] < 0.76
    bounds = artifact.manifest["metrics"]["least_costs"]
    assert bounds["prompt by prompt"] < judged["auto"]["cost"]
    card = (folder / "toy@1" / "README.md").read_text()
    assert "| `auto` | " in card
    assert "choices cost at least: always alike" in card


def test_fit_only_keeps_recipes_of_the_named_experts(folder: Path) -> None:
    found = ExpertMap.from_artifact(load_artifact(folder / "toy@1")).only(["small", "maths"])
    assert set(found.experts) == {"small", "maths"}
    with pytest.raises(ValueError, match="no recipe"):
        found.only(["nobody"])


def test_evaluate_scores_unseen_rows(folder: Path) -> None:
    said: list[str] = []
    result = evaluate_command.run(
        artifact=folder / "toy@1",
        outcomes=[folder / "test.jsonl", folder / "train.jsonl"],
        costs=folder / "costs.json",
        budgets=[2, 5],
        plot_to=folder / "plot.png",
        say=said.append,
    )
    assert set(result) == {
        "compared",
        "best_single",
        "random",
        "oracle",
        "mix",
        "frontier",
        "at",
        "category_accuracy",
    }
    assert "240 of 360 rows were used in the fit: not judged" in said
    assert result["category_accuracy"] == pytest.approx(1.0)
    assert result["best_single"]["model"] == "large"
    for at in result["at"]:
        assert at["cost"] <= at["budget"] + 1e-9
        assert at["score"] > at["mix_score"]
    costs = [point["cost"] for point in result["frontier"]]
    assert costs[0] < costs[-1]
    assert set(result["frontier"][0]["recipes"]) == {"sums", "tales"}
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    json.dumps(result, allow_nan=False)


def test_evaluate_rows_all_seen_scores_out_of_fold(folder: Path) -> None:
    said: list[str] = []
    result = evaluate_command.run(
        artifact=folder / "toy@1",
        outcomes=[folder / "train.jsonl"],
        costs=folder / "costs.json",
        say=said.append,
    )
    assert any("did not see it" in line for line in said)
    assert result["category_accuracy"] == 1.0


def test_fit_without_categories_clusters_the_prompts(folder: Path) -> None:
    said: list[str] = []
    metrics = router_fit.run(
        outcomes=[folder / "bare.jsonl"],
        costs=folder / "costs.json",
        out=folder / "bare@1",
        folds=2,
        settings=replace(SETTINGS, inner_folds=2),
        say=said.append,
    )
    assert metrics["category_accuracy"] is None
    assert any("clusters stand for them" in line for line in said)


def test_fit_works_with_a_handful_of_rows(folder: Path) -> None:
    few = folder / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, rows(3, 9))))
    router_fit.run(
        outcomes=[few],
        costs=folder / "costs.json",
        out=folder / "few@1",
        settings=SETTINGS,
        say=lambda line: None,
    )
    Classifier.from_artifact(load_artifact(folder / "few@1")).assess("add cows")


def test_evaluate_artifact_without_a_map_raises(folder: Path) -> None:
    demo = Path(__file__).parents[3] / "router_models" / "artifacts" / "demo@1"
    with pytest.raises(ArtifactError, match="no map"):
        evaluate_command.run(
            artifact=demo, outcomes=[folder / "test.jsonl"], costs=folder / "costs.json"
        )


def test_fit_and_evaluate_commands_run(folder: Path) -> None:
    runner = CliRunner()
    common = ["--costs", str(folder / "costs.json"), "--outcomes"]
    files = [str(folder / "test.jsonl"), str(folder / "bare.jsonl")]
    out = str(folder / "cli@1")
    done = runner.invoke(group, ["fit", *common, *files, "--out", out])
    assert done.exit_code == 0, done.output
    assert (folder / "cli@1" / "manifest.json").is_file()
    done = runner.invoke(
        group,
        [
            *("evaluate", "--artifact", out, "--json", "--budgets", "5,10"),
            *("--experts", "small,large", *common, str(folder / "train.jsonl")),
        ],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [at["budget"] for at in result["at"]] == [5, 10]
    done = runner.invoke(group, ["evaluate", "--artifact", out, *common, str(folder / "nothing")])
    assert done.exit_code == 1
    assert "No such file" in done.output
    assert "Traceback" not in done.output


def test_expert_map_shrinks_sparse_cells_to_the_average() -> None:
    values = np.array([[1.0, 0.0], [1.0, np.nan], [0.0, 1.0]])
    cells, count = shrunk_cells(values, np.array([0, 0, 1]), 2, 0.0)
    assert cells.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert count.tolist() == [[2, 1], [1, 1]]
    cells, _ = shrunk_cells(values, np.array([0, 0, 1]), 2, 1e12)
    assert cells[0] == pytest.approx([2 / 3, 1 / 2])


def test_logistic_and_ridge_regression_recover_a_simple_rule() -> None:
    texts = [f"{'red' if i % 2 else 'blue'} thing {i}" for i in range(80)]
    labels = np.arange(80) % 2
    corpus = featurize(texts, SETTINGS.spec)
    x = design(corpus.counts, np.ones(SETTINGS.spec.buckets, np.float32))
    weight, bias = fit_logistic(x, np.eye(2)[labels], l2=1e-4)
    p = softmax(np.asarray(x @ weight + bias))
    assert (p.argmax(axis=1) == labels).all()
    assert calibration_error(p, labels) < 0.1
    kernel = TextKernel(x)
    train, test = np.arange(60), np.arange(60, 80)
    target = np.eye(2)[labels]
    direct = kernel.solve(train, target[train], 0.5)
    iterated = TextKernel._iterate(kernel.x[train], (target[train] - 0.5).astype(np.float32), 0.5)
    assert iterated == pytest.approx(direct, abs=1e-3)
    assert (kernel.predict(train, direct, test).argmax(axis=1) == labels[test]).all()
    assert np.asarray(x[test] @ kernel.weight(train, direct)) == pytest.approx(
        kernel.predict(train, direct, test), abs=1e-4
    )


@pytest.mark.parametrize("seed", range(3))
def test_fit_logistic_of_dense_and_sparse_inputs_is_the_same(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(200, 8)).astype(np.float32)
    target = np.eye(3)[(x @ draw.normal(size=(8, 3))).argmax(axis=1)]
    weight = draw.random(200)
    dense = fit_logistic(x, target, l2=1e-2, row_weight=weight)
    thin = fit_logistic(sparse.csr_matrix(x), target, l2=1e-2, row_weight=weight)
    for one, other in zip(dense, thin, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
