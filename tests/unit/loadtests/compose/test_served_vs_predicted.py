"""Predictions for a served composition, and whether measured figures fit them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtests.compose.served_vs_predicted import (
    TASKS,
    Prediction,
    cost_interval,
    measure_served,
    predict,
    quality_interval,
    queue_wait,
    swap_wait,
    within,
)
from loadtests.lib.targets_and_report import Report
from router_models.outcome_recording.task_reader import read_tasks
from service.config import Config, load_config
from service.types import Recipe
from tests.support.in_process_service import ADMIN_KEY, run_gateway

ROOT = Path(__file__).parents[4]
A = Recipe("single", ("a",))
DEMO = ROOT / "deploy" / "config" / "demo.yaml"


def test_held_out_tasks_are_other_ones_than_those_of_the_fit() -> None:
    fitted = {
        json.loads(line)["prompt"]
        for line in (ROOT / "router_models" / "demo" / "tasks.jsonl").read_text().splitlines()
    }
    tasks = read_tasks([TASKS])
    assert not fitted & {task.text for task in tasks}
    assert set(Counter(task.category for task in tasks).values()) == {16}


def test_predict_of_the_demo_sends_tasks_to_the_experts_of_their_categories() -> None:
    tasks = read_tasks([TASKS])
    found = predict(load_config(DEMO), tasks)
    right = [
        recipe.name == task.category
        for recipe, task in zip(found.recipes, tasks, strict=True)
        if task.category != "general"
    ]
    assert np.mean(right) > 0.9
    interval = quality_interval(found)
    assert 0 < interval.low < interval.value < interval.high < 1
    assert found.error > 0
    assert (found.cost > 0).all()


def test_predict_without_a_map_says_so(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = "experts: {a: {model: a, categories: [general]}}\npools: {cpu: {engine: simulated}}\n"
    path.write_text(text)
    with pytest.raises(ValueError, match="no expert map"):
        predict(load_config(path), read_tasks([TASKS]))


@pytest.mark.parametrize("seed", range(5))
def test_intervals_hold_true_means_and_refuse_false_ones(seed: int) -> None:
    draw = np.random.default_rng(seed)
    held = [0, 0]
    for _ in range(200):
        true = draw.uniform(0.1, 0.9, 64)
        cost = draw.gamma(4.0, 1e-6, 64)
        # The map is wrong by a common error of 3 points, as its fit on few rows may be.
        guess = np.clip(true + draw.normal(0, 0.03), 0.01, 0.99)
        found = Prediction((A,) * 64, guess, np.full(64, 4e-6), 0.03, 0.02)
        score = (draw.random(64) < true).astype(float)
        held[0] += within("score", quality_interval(found), float(score.mean())).ok
        held[1] += within("cost", cost_interval(found, cost), float(cost.mean())).ok
    assert held[0] > 180
    assert held[1] > 180
    far = Prediction((A,) * 64, np.full(64, 0.5), np.full(64, 4e-6), 0.03, 0.02)
    assert not within("score", quality_interval(far), 0.8).ok
    assert not within("cost", cost_interval(far, np.full(64, 9e-6)), 9e-6).ok


def test_queue_wait_adds_pools_and_experts() -> None:
    text = (
        "# TYPE coe_queue_seconds histogram\n"
        'coe_queue_seconds_bucket{expert="a",le="+Inf"} 4\n'
        'coe_queue_seconds_sum{expert="a"} 1.5\n'
        'coe_queue_seconds_count{expert="a"} 4\n'
        'coe_queue_seconds_bucket{expert="b",le="+Inf"} 1\n'
        'coe_queue_seconds_sum{expert="b"} 0.5\n'
        'coe_queue_seconds_count{expert="b"} 1\n'
    )
    assert queue_wait(text) == (2.0, 5.0)
    assert queue_wait("") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("pools", "asked", "wait_s"),
    [
        ({"cpu": {}}, ["a", "b", "c"], 0.0),
        # `a` is at home, and the swap back to it takes 1 s.
        ({"cpu": {"slots": 1}}, ["a"], 0.0),
        ({"cpu": {"slots": 1}}, ["b"], 3.0),
        ({"cpu": {"slots": 1}}, ["a", "b", "c", "b"], (0 + 3 + 5 + 3) / 4),
        ({"cpu": {"slots": 2}}, ["b", "c"], (0 + 6) / 2),
        ({"cpu": {"slots": 1}, "other": {"experts": ["c"]}}, ["c"], 0.0),
        ({"cpu": {"slots": 1}}, ["vote"], 5.0),
        ({"cpu": {"slots": 1}}, ["cascade"], 3.0 + 5.0),
    ],
)
def test_swap_wait_is_that_of_guests_there_and_back(
    pools: dict[str, dict[str, object]], asked: list[str], wait_s: float
) -> None:
    data = {
        "experts": {name: {"model": name} for name in "abc"},
        "pools": {kind: {"engine": "simulated", **pool} for kind, pool in pools.items()},
    }
    known = {name: Recipe("single", (name,)) for name in "abc"}
    known["vote"] = Recipe("vote", ("a", "b", "c"))
    known["cascade"] = Recipe("cascade", ("a", "b"), ("c",))
    swap_s = {"a": 1.0, "b": 2.0, "c": 4.0}
    found = swap_wait(Config.model_validate(data), [known[name] for name in asked], swap_s)
    assert found == pytest.approx(wait_s)


async def test_measure_served_asks_a_running_service_and_reports(tmp_path: Path) -> None:
    lines = TASKS.read_text().splitlines()
    tasks, path = tmp_path / "tasks.jsonl", tmp_path / "coe.yaml"
    tasks.write_text("\n".join(line for line in lines if '"exact"' in line) + "\n")
    price = {"prompt": 0.1345, "completion": 0.1345}
    data = {
        "router": {"artifact": str(ROOT / "router_models" / "artifacts" / "demo@2")},
        "experts": {
            name: {"model": name, "categories": [name], "price": price}
            for name in ("general", "math", "intents", "code")
        },
        "pools": {"cpu": {"engine": "simulated", "simulated": {"tokens": 4}}},
    }
    path.write_text(yaml.safe_dump(data))
    report = Report("compose")
    async with run_gateway(Config.model_validate(data)) as s:
        await asyncio.to_thread(measure_served, report, s.url, path, tasks, "fast", 1.0)
    facts = report.facts["served"]
    assert facts["tasks"] == 16
    assert facts["cost"] > 0
    # The simulated engine names no intent, which is told and not hidden.
    met = {check.name.split(",")[0]: check.ok for check in report.reach}
    assert facts["score"] == 0.0
    assert facts["predicted_score"] > 0.5
    assert not met["mean score"]
    assert met["mean wait in queues and for swaps"]


async def test_swaps_in_a_slot_take_no_longer_than_the_composition_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pools' own planner and queues, with engines that take turns at a known time of a swap."""
    monkeypatch.setenv("COE_ADMIN_KEY", ADMIN_KEY)
    tasks, path = tmp_path / "tasks.jsonl", tmp_path / "coe.yaml"
    lines = TASKS.read_text().splitlines()
    # By turns, so that nearly every request needs a swap.
    tasks.write_text("\n".join(lines[i] for at in range(5) for i in range(at, 64, 16)) + "\n")
    names = ("general", "math", "intents", "code")
    turns = {"fill_s": 0.01, "swap_s": 0.1, "tokens": 4, "decode_ms": 1}
    data = {
        "router": {"artifact": str(ROOT / "router_models" / "artifacts" / "demo@2")},
        "experts": {name: {"model": name, "categories": [name]} for name in names},
        "pools": {"cpu": {"engine": "simulated", "slots": 1, "simulated": turns}},
    }
    path.write_text(yaml.safe_dump(data))
    report = Report("compose")
    async with run_gateway(Config.model_validate(data)) as s:
        await asyncio.to_thread(measure_served, report, s.url, path, tasks, "best", None)
    facts = report.facts["served"]
    assert 0.1 < facts["predicted_wait_s"] <= 0.25
    assert 0.03 < facts["wait_s"] <= facts["predicted_wait_s"] + 0.05
    assert report.reach[-1].ok
