"""The expert map: its formula by hand, and what it refuses to load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.classifier.classifier import Assessment, Classifier
from service.classifier.expert_map import ExpertMap
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.router_artifact import MANIFEST, load_artifact, save_artifact
from service.errors import ArtifactError
from service.types import MAX_LATER, CategoryScores, Recipe

SPEC = FeatureSpec(bits=8, known_bits=8)
RECIPES = [Recipe("single", ("a",)), Recipe("single", ("b",)), Recipe("cascade", ("a",), ("b",))]


def manifest() -> dict[str, Any]:
    return {
        "classifier": {
            "features": SPEC.to_json(),
            "categories": ["x", "y"],
            "factors": 1,
            "calibration": {"method": "temperature", "temperature": 1.0},
            "thresholds": {"min_confidence": 0.3, "max_novelty": 0.5},
        },
        "map": {"recipes": [r.to_json() for r in RECIPES], "factors": 1},
    }


def tensors() -> dict[str, Any]:
    f = np.float32
    return {
        "classifier.idf": np.ones(SPEC.buckets, np.float16),
        "classifier.weight": np.zeros((SPEC.buckets, 2), np.float16),
        "classifier.bias": np.zeros(2, f),
        "classifier.factor_weight": np.zeros((SPEC.buckets, 1), np.float16),
        "classifier.factor_bias": np.array([0.5], f),
        "classifier.known": np.full(32, 255, np.uint8),
        "map.prior": np.array([0.75, 0.25], f),
        "map.score": np.array([[0.4, 0.8, 0.7], [0.6, 0.2, 0.5]], f),
        "map.count": np.full((2, 3), 10, f),
        "map.cost": np.array([[1, 9, 4], [1, 9, 6]], f),
        "map.reach": np.array([[[0] * 3, [0] * 3, [0.5, 0, 0]]] * 2, f),
        "map.score_slope": np.array([[[0.1, 0, 0]], [[0.3, 0, 0]]], f),
        "map.cost_slope": np.array([[[0, 0, 2]], [[0, 0, -2]]], f),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "m@1", manifest(), tensors(), "")
    return tmp_path / "m@1"


def assessed(p: float, factor: float, novelty: float = 0.0) -> Assessment:
    scores = CategoryScores(("x", "y"), (p, 1 - p), "x", max(p, 1 - p), novelty)
    return Assessment(scores, np.array([factor]))


def test_expert_map_quality_follows_the_formula(folder: Path) -> None:
    found = ExpertMap.from_artifact(load_artifact(folder))
    estimate = found.estimate(assessed(0.5, 2.0))
    assert estimate.quality == pytest.approx([0.5 + 2 * 0.2, 0.5, 0.6])
    assert estimate.cost == pytest.approx([1, 9, 5])
    assert estimate.reach.shape == (3, MAX_LATER)
    assert estimate.reach[2, 0] == pytest.approx(0.5)


def test_expert_map_quality_stays_within_bounds(folder: Path) -> None:
    estimate = ExpertMap.from_artifact(load_artifact(folder)).estimate(assessed(0.0, 1000.0))
    assert estimate.quality.max() <= 1
    assert estimate.cost.min() >= 0


def test_expert_map_without_direct_estimate_novel_prompt_gets_the_average(folder: Path) -> None:
    estimate = ExpertMap.from_artifact(load_artifact(folder)).estimate(
        assessed(0.0, 9.0, novelty=0.9)
    )
    assert estimate.quality == pytest.approx([0.45, 0.65, 0.65])


DIRECT: dict[str, Any] = {
    "map.direct_score": np.array([0.5, 0.3, 0.9], np.float32),
    "map.direct_cost": np.array([2, 8, 3], np.float32),
    "map.direct_reach": np.array([[0] * 3, [0] * 3, [0.1, 0, 0]], np.float32),
    "map.direct_score_slope": np.array([[0.2, -0.1, 0]], np.float32),
    "map.direct_cost_slope": np.array([[0, 0, 1]], np.float32),
}


def with_direct(path: Path, power: float) -> ExpertMap:
    changed = manifest()
    changed["map"]["trust_power"] = power
    save_artifact(path, changed, tensors() | DIRECT, "")
    return ExpertMap.from_artifact(load_artifact(path))


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_expert_map_direct_estimate_counts_as_far_as_the_category_is_doubtful(
    tmp_path: Path, power: float, p: float
) -> None:
    whole, alone = with_direct(tmp_path / "d@1", power), with_direct(tmp_path / "a@1", 0.0)
    found, mapped = whole.estimate(assessed(p, 1.0)), alone.estimate(assessed(p, 1.0))
    novel = whole.estimate(assessed(p, 1.0, novelty=0.9))
    assert novel.quality == pytest.approx([0.7, 0.2, 0.9])
    assert novel.cost == pytest.approx([2, 8, 4])
    assert novel.reach[2, 0] == pytest.approx(0.1)
    trust = p**power
    for name in ("quality", "cost", "reach"):
        expected = trust * getattr(mapped, name) + (1 - trust) * getattr(novel, name)
        assert getattr(found, name) == pytest.approx(expected), name
    part = whole.only(["b"])
    assert part.estimate(assessed(p, 1.0)).quality == pytest.approx(found.quality[1:2])
    assert part.estimate(assessed(p, 1.0)).cost == pytest.approx(found.cost[1:2])


def test_expert_map_negative_trust_power_raises(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"trust_power must be 0\.\.64"):
        with_direct(tmp_path / "d@1", -1.0)


def test_expert_map_subset_of_recipes_computes_the_same(folder: Path) -> None:
    whole = ExpertMap.from_artifact(load_artifact(folder))
    part = whole.only(["a"])
    assert part.recipes == (RECIPES[0],)
    assert part.experts == ("a",)
    assessment = assessed(0.3, 1.5)
    assert part.estimate(assessment).quality == pytest.approx(
        whole.estimate(assessment).quality[:1]
    )
    assert part.estimate(assessment).cost == pytest.approx(whole.estimate(assessment).cost[:1])


def test_expert_map_and_classifier_share_their_categories(folder: Path) -> None:
    artifact = load_artifact(folder)
    assessment = Classifier.from_artifact(artifact).assess("hello")
    assert assessment.factors == pytest.approx([0.5])
    ExpertMap.from_artifact(artifact).estimate(assessment)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"map": {"recipes": [], "factors": 1}}, "1..256 distinct recipes"),
        ({"map": {"recipes": [RECIPES[0].to_json()] * 2, "factors": 1}}, "distinct"),
        ({"map": {"recipes": [RECIPES[0].to_json()], "factors": 1}}, "shape"),
        ({"map": {"recipes": [{"kind": "single"}], "factors": 1}}, "members"),
        ({"map": {"factors": 1}}, "recipes"),
        ({"map": None}, "'map' is missing"),
    ],
)
def test_expert_map_invalid_section_raises(
    folder: Path, change: dict[str, Any], fault: str
) -> None:
    found = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(found | change))
    with pytest.raises(ArtifactError, match=fault):
        ExpertMap.from_artifact(load_artifact(folder))


def with_tokens(experts: object, answer: list[list[float]]) -> tuple[dict[str, Any], Any]:
    told, weights = manifest(), tensors()
    told["map"]["token_experts"] = experts
    weights |= {
        "map.prompt_tokens": np.array([[40, 50], [60, 70]], np.float32),
        "map.answer_tokens": np.array(answer, np.float32),
        "map.added_tokens": np.array([20, 5], np.float32),
    }
    return told, weights


def test_expert_map_has_the_recorded_tokens_of_the_experts_that_stay(tmp_path: Path) -> None:
    save_artifact(tmp_path / "t@1", *with_tokens(["b", "a"], [[1, 2], [3, 4]]), "")
    found = ExpertMap.from_artifact(load_artifact(tmp_path / "t@1"))
    assert found.tokens is not None
    assert found.tokens.experts == ("b", "a")
    part = found.only(["a"]).tokens
    assert part is not None
    assert part.experts == ("a",)
    assert part.prompt.tolist() == [[50], [70]]
    assert part.answer.tolist() == [[2], [4]]
    assert part.added.tolist() == [5]


@pytest.mark.parametrize(
    ("experts", "answer"), [(["a", "b"], [[1, -2], [3, 4]]), (["a"], [[1, 2], [3, 4]]), (3, [[1]])]
)
def test_expert_map_invalid_tokens_raise(
    tmp_path: Path, experts: object, answer: list[list[float]]
) -> None:
    save_artifact(tmp_path / "t@1", *with_tokens(experts, answer), "")
    with pytest.raises(ArtifactError, match="map"):
        ExpertMap.from_artifact(load_artifact(tmp_path / "t@1"))


def test_expert_map_has_the_recorded_thinking_of_the_experts_that_stay(tmp_path: Path) -> None:
    told, weights = manifest(), tensors()
    told["map"] |= {"thinking_experts": ["b", "a"], "thinking_samples": 3}
    weights["map.thinking_tokens"] = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    save_artifact(tmp_path / "t@1", told, weights, "")
    found = ExpertMap.from_artifact(load_artifact(tmp_path / "t@1")).only(["a"]).thinking
    assert found is not None
    assert found.experts == ("a",)
    assert found.samples[:, 1, 0].tolist() == [3, 7, 11]
    del told["map"]["thinking_samples"]
    save_artifact(tmp_path / "u@1", told, weights, "")
    with pytest.raises(ArtifactError, match="thinking_samples"):
        ExpertMap.from_artifact(load_artifact(tmp_path / "u@1"))


def test_expert_map_without_recorded_tokens_has_none(folder: Path) -> None:
    assert ExpertMap.from_artifact(load_artifact(folder)).tokens is None
    assert ExpertMap.from_artifact(load_artifact(folder)).thinking is None
    assert ExpertMap.from_artifact(load_artifact(folder)).only(["a"]).tokens is None


def test_copies_have_the_figures_of_their_originals_alone(folder: Path) -> None:
    found = ExpertMap.from_artifact(load_artifact(folder))
    more = found.with_copies({"tuned": "b", "stranger": "nobody", "a": "b"})
    assert more.recipes == (*RECIPES, Recipe("single", ("tuned",)))
    factors = np.array([0.5])
    before, after = found.quality_by_category(factors), more.quality_by_category(factors)
    assert np.array_equal(after[:, :3], before)
    assert np.array_equal(after[:, 3], before[:, 1])
    for name in ("score", "count", "cost", "reach"):
        assert np.array_equal(getattr(more, name)[:, 3], getattr(found, name)[:, 1])
    assert np.array_equal(more.direct.score[3], found.direct.score[1])
    assert found.with_copies({"x": "nobody"}) is found
