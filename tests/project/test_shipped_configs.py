"""Every config that ships has an artifact, and `auto` spreads prompts as its map says."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from router_models.outcome_recording.task_reader import read_tasks
from service.classifier.built_in_artifact import built_in_artifact
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact
from service.config import Config
from service.config.loader import read_config
from service.default_prices import with_default_prices
from service.gateway.routing.quality_cost_frontier import WEIGHTS, frontier_of, routing_warnings
from service.gateway.routing.routing_setup import RoutingSetup

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "config"
IMAGE = "/opt/coe/"
# Generated from the schema: every key with its default, and no composition.
SCHEMA = "reference.yaml"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != SCHEMA)
# One model serves every prompt here, or its forms do.
NOT_ROUTED: dict[str, str] = {
    "command-servers": "its models are the readers' own, without recorded outcomes",
    "demo-moe": "its experts are one mixture under several names, without outcomes of their own",
}
PROMPTS = (
    "What is the capital of Norway?",
    "Hello, how are you today?",
    "Who painted the Mona Lisa?",
    "Explain why the sky is blue.",
    "Anna has 12 apples and gives 5 to Ben. How many does she have left?",
    "A train runs 120 km in 1.5 hours. How fast is it?",
    "Solve x^2 - 5x + 6 = 0.",
    "Write a Python function that reverses a string.",
    "Why does this SQL query return no rows? SELECT * FROM a WHERE b = NULL",
    "set an alarm for seven tomorrow",
    "book a flight to Paris",
    "how much money is in my checking account",
    "Is a spoken contract binding?",
    "What are the side effects of ibuprofen?",
    "What is the difference between a debit and a credit?",
    "Why did the Roman Empire fall?",
    "Which moral theory judges an act by its consequences alone?",
    "What voltage drops over a resistor of 10 ohm at 2 A?",
    "What is the time complexity of merge sort?",
    "Translate good morning into Spanish.",
)


def shipped(name: str) -> Config:
    """A shipped config; paths of the image are those of this folder."""
    text = (FOLDER / f"{name}.yaml").read_text().replace(IMAGE, f"{ROOT}/")
    config = read_config(yaml.safe_load(text), name, FOLDER)
    return with_default_prices(config)


def test_demo_map_is_fitted_on_the_outcomes_and_tasks_beside_it() -> None:
    folder = ROOT / "router_models" / "demo"
    manifest = json.loads(
        (ROOT / "router_models" / "artifacts" / "demo@2" / "manifest.json").read_text()
    )
    outcomes = folder / "outcomes.jsonl"
    (data,) = manifest["map"]["data"]
    assert data["sha256"] == hashlib.sha256(outcomes.read_bytes()).hexdigest()
    tasks = read_tasks([folder / "tasks.jsonl"])
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert {task.id for task in tasks} == {row["id"] for row in rows}
    counts = Counter(task.category for task in tasks)
    assert set(counts) == set(manifest["categories"])
    assert min(counts.values()) >= 40
    # Beside always asking the best single expert, the demo's router must pay.
    (best,) = [g for g in manifest["map"]["held_out"]["gains"] if g["preset"] == "auto"]
    assert best["lead"] > 3 * best["lead_se"] > 0


def test_public_map_has_gains_and_every_model_a_size() -> None:
    folder = ROOT / "router_models" / "artifacts" / "public@1"
    manifest = json.loads((folder / "manifest.json").read_text())
    experts = yaml.safe_load((folder / "experts.yaml").read_text())["experts"]
    assert (
        set(manifest["experts"])
        == set(experts)
        == set(json.loads((folder / "sizes.json").read_text()))
    )
    gains = {g["preset"]: g for g in manifest["map"]["held_out"]["gains"]}
    for one in gains.values():
        assert one["lead"] > 1.96 * one["lead_se"] > 0
    assert gains["auto:fast"]["cost"] <= 0.8
    # What is served are the presets and lengths of its own.
    priced = {name: one["point_cost"] for name, one in manifest["map"]["presets"].items()}
    assert 0 < priced["fast"] < priced["auto"] < 1 < priced["best"]
    assert set(manifest["map"]["token_experts"]) == set(experts)
    assert manifest["map"]["classifier"] == built_in_artifact().name
    card = (folder / "README.md").read_text()
    assert "Apache-2.0" in card
    assert "Expected gains" in card


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_config_has_an_artifact_or_says_why_not(name: str) -> None:
    config = shipped(name)
    if name in NOT_ROUTED:
        return
    assert config.router.artifact is not None
    assert (Path(config.router.artifact) / "manifest.json").is_file()
    setup = RoutingSetup(config)
    assert setup.stages.classifies
    assert setup.has_map
    assert not [line for line in routing_warnings(config, setup) if "no classifier" in line]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_ROUTED])
def test_auto_spreads_prompts_as_the_map_says(name: str) -> None:
    config = shipped(name)
    setup = RoutingSetup(config)
    assert config.router.artifact is not None
    whole = ExpertMap.from_artifact(load_artifact(Path(config.router.artifact)))
    known = whole.only([expert for expert in whole.experts if expert in config.experts])
    found = frontier_of(config, setup)
    index = {recipe: r for r, recipe in enumerate(found.recipes)}
    chosen = set()
    for prompt in PROMPTS:
        body = {"messages": [{"role": "user", "content": prompt}]}
        assessment = setup.stages.assess(body)
        posterior = setup.quality_model.posterior(
            dict(
                zip(
                    assessment.scores.labels,
                    assessment.scores.probabilities,
                    strict=True,
                )
            )
        )
        quality, _ = setup.quality_model.quality(posterior, assessment)
        said = known.estimate(assessment).quality
        for recipe, value in zip(known.recipes, said, strict=True):
            at = setup.catalog.recipe_index[recipe]
            assert quality[at] == pytest.approx(value, abs=1e-6), (prompt, recipe.name)
        for weight in WEIGHTS:
            price = found.prices(posterior, float(weight))
            utility = [
                quality[setup.catalog.recipe_index[r]] - price[index[r]] for r in known.recipes
            ]
            chosen.add(known.recipes[int(np.argmax(utility))])
    dominant = [line for line in routing_warnings(config, setup) if "every category" in line]
    # One dominant recipe is no fault of a config, but it is told and not hidden.
    assert (len(chosen) > 1) == (not dominant), (name, [r.name for r in chosen])


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_ROUTED])
def test_presets_are_points_of_the_frontier_in_their_order(name: str) -> None:
    config = shipped(name)
    found = frontier_of(config, RoutingSetup(config))
    presets = found.presets
    points = []
    for preset in (presets.fast, presets.auto, presets.best):
        at = found.chosen(preset.cost_weight)
        rows = np.arange(len(found.categories))
        points.append((found.share @ found.quality[rows, at], found.share @ found.cost[rows, at]))
    for (worse, cheaper), (better, dearer) in ((points[0], points[1]), (points[1], points[2])):
        assert better >= worse - 1e-9
        assert dearer >= cheaper - 1e-12


@pytest.mark.parametrize("name", ["demo", "compose"])
def test_demo_has_a_frontier_on_which_its_presets_stand_apart(name: str) -> None:
    config = shipped(name)
    setup = RoutingSetup(config)
    found = frontier_of(config, setup)
    rows = np.arange(len(found.categories))

    def point(weight: float) -> tuple[float, float]:
        at = found.chosen(weight)
        return (
            round(float(found.share @ found.quality[rows, at]), 6),
            round(float(found.share @ found.cost[rows, at]) * 1e6, 6),
        )

    points = sorted({point(float(weight)) for weight in WEIGHTS})
    assert len(points) >= 3
    # No point is dominated: what is better costs more.
    for (worse, cheaper), (better, dearer) in itertools.pairwise(points):
        assert better > worse
        assert dearer > cheaper
    presets = found.presets
    assert point(presets.fast.cost_weight) < point(presets.auto.cost_weight)
    # The map says that nothing needs the base model, and the check of the config tells it.
    (told,) = [line for line in routing_warnings(config, setup) if "fallback" in line]
    assert "'general'" in told
