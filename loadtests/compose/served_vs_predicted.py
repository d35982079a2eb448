"""What a running service really gives, beside what its config predicts.

The prediction is that of the router's map for these very prompts, with every expert idle; the
composition's bound on swaps (`composition_problem`) says how long they wait at most. The tasks must
be other ones than those that the map was fitted on. Measured figures differ from the truth by
chance, and so does the map, which was fitted on few rows: both go into the interval.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, TargetCheck
from router_models.outcome_recording.task_reader import Task, read_tasks
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact
from service.cli.http_client import admin
from service.config import Config, load_config
from service.default_prices import with_default_prices
from service.gateway.routing.quality_cost_frontier import frontier_of
from service.gateway.routing.routing_setup import RoutingSetup
from service.types import Recipe

Floats = NDArray[np.float64]

TASKS = Path(__file__).with_name("held_out_tasks.jsonl")
_COVERED = 1.96
_TIMEOUT_S = 560
# One request at a time waits for no other one. A snapshot may be old by as much.
_QUEUE_S = 0.05


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the router expects for N tasks.

    Attributes:
        recipes: The recipe of each task.
        quality: (N,), expected score.
        cost: (N,), expected cost, in the unit of prices.
        error: Standard error of the mean quality, of the map's fit alone.
        cost_error: The same of the mean cost, as a share of it.
    """

    recipes: tuple[Recipe, ...]
    quality: Floats
    cost: Floats
    error: float
    cost_error: float


def predict(config: Config, tasks: Sequence[Task], preset: str = "") -> Prediction:
    """Predict the mean score and cost of tasks under a preset of `auto`.

    Raises:
        ValueError: The config's artifact has no map.
    """
    config = with_default_prices(config)
    setup = RoutingSetup(config)
    if config.router.artifact is None or not setup.has_map:
        raise ValueError("the config's router has no expert map to predict by")
    known = ExpertMap.from_artifact(load_artifact(Path(config.router.artifact)))
    known = known.only([name for name in known.experts if name in config.experts])
    found = frontier_of(config, setup)
    index = {recipe: r for r, recipe in enumerate(found.recipes)}
    columns = [index[recipe] for recipe in known.recipes]
    weight = setup.presets.of(preset).cost_weight
    rows, total = np.zeros(known.score.shape), len(tasks)
    quality, cost, recipes = np.zeros(total), np.zeros(total), []
    for i, task in enumerate(tasks):
        assessment = setup.stages.assess({"messages": task.conversation()})
        told = known.estimate(assessment)
        scores = assessment.scores
        posterior = setup.quality_model.posterior(
            dict(zip(scores.labels, scores.probabilities, strict=True))
        )
        best = int((told.quality - found.prices(posterior, weight)[columns]).argmax())
        quality[i], cost[i] = told.quality[best], told.cost[best]
        rows[:, best] += np.asarray(scores.probabilities)
        recipes.append(known.recipes[best])
    # Each cell of the map is a mean over its rows, and counts as often as it is used.
    variance = known.score * (1 - known.score) / np.maximum(known.count, 1.0)
    error = float(np.sqrt((rows**2 * variance).sum())) / total
    spread = float(cost.std() / cost.mean()) if cost.mean() > 0 else 0.0
    cost_error = spread / float(np.sqrt(max(1.0, known.count.max())))
    return Prediction(tuple(recipes), quality, cost, error, cost_error)


def quality_interval(predicted: Prediction) -> Estimate:
    """Where the measured mean score lies in 95 of 100 such measurements."""
    chance = (
        float((predicted.quality * (1 - predicted.quality)).sum()) / len(predicted.quality) ** 2
    )
    mean = float(predicted.quality.mean())
    half = _COVERED * float(np.sqrt(chance + predicted.error**2))
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))


def cost_interval(predicted: Prediction, measured: Floats) -> Estimate:
    """Where the measured mean cost lies in 95 of 100 such measurements."""
    mean = float(predicted.cost.mean())
    chance = float(measured.std() / np.sqrt(len(measured)))
    half = _COVERED * float(np.hypot(chance, predicted.cost_error * mean))
    return Estimate(mean, max(0.0, mean - half), mean + half)


def within(name: str, interval: Estimate, measured: float) -> TargetCheck:
    """Met when the measured figure is in the predicted interval."""
    inside = interval.low <= measured <= interval.high
    low, high = f"{interval.low:.3g}", f"{interval.high:.3g}"
    return TargetCheck(f"{name}, predicted {low} to {high}", interval.value, measured, inside)


def swap_wait(config: Config, recipes: Sequence[Recipe], swap_s: Mapping[str, float]) -> float:
    """The bound on the mean wait for swaps of these recipes, in s, as compositions have it.

    In a slot, the first units are at home. A request for another one waits for the swap to it and
    for the swap back; a cascade's later experts count as if they were always asked.

    Args:
        config: The config.
        recipes: The recipe of each request.
        swap_s: The time of a swap to each expert, as the pools measured it.
    """
    waits: dict[str, float] = {}
    for kind, pool in config.pools.items():
        groups = config.groups(kind)
        turns = pool.slots is not None and pool.slots < len(groups)
        home = groups[: pool.slots] if turns else groups
        at_home = {expert for group in home for unit in group for expert in unit}
        back_s = max((swap_s.get(expert, 0.0) for expert in at_home), default=0.0)
        for expert in config.local_experts(kind):
            owner = config.owner_of(expert)
            wait = 0.0 if owner in at_home else swap_s.get(owner, 0.0) + back_s
            waits[expert] = min(wait, waits.get(expert, wait))
    # Members are asked at once: the slowest one counts.
    return sum(
        max((waits.get(e, 0.0) for e in recipe.members), default=0.0)
        + sum(waits.get(e, 0.0) for e in recipe.later)
        for recipe in recipes
    ) / max(1, len(recipes))


def queue_wait(text: str) -> tuple[float, float]:
    """The sum of the waits in pools' queues, swaps included, in s, and their number."""
    total = count = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "coe_queue_seconds_sum":
                total += sample.value
            elif sample.name == "coe_queue_seconds_count":
                count += sample.value
    return total, count


def measure_served(
    report: Report, url: str, config: Path, tasks: Path, preset: str, wait_s: float | None
) -> None:
    """Ask a running service the tasks one after the other, and compare.

    Args:
        report: The report to write to.
        url: The service.
        config: The config that it runs from.
        tasks: The tasks.
        preset: The suffix of `auto`.
        wait_s: The longest mean wait; None takes the bound on swaps, and `_QUEUE_S` for queues.
    """
    chosen = read_tasks([tasks])
    served = load_config(config)
    predicted = predict(served, chosen, preset)
    model = f"auto:{preset}" if preset else "auto"
    for name in dict.fromkeys(expert for recipe in predicted.recipes for expert in recipe.experts):
        _warm(url, name)
    takes_turns = any(pool.slots is not None for pool in served.pools.values())
    swaps_s = swap_wait(served, predicted.recipes, _swap_times(url) if takes_turns else {})
    wait_s = swaps_s + _QUEUE_S if wait_s is None else wait_s
    before = queue_wait(_metrics(url))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.jsonl"
        words = ["outcomes", "record", "--prompts", str(tasks), "--experts", model]
        words += ["--base-url", url, "--concurrency", "1", "--out", str(out)]
        subprocess.run(
            [sys.executable, "-m", "service.cli", *words], check=True, timeout=_TIMEOUT_S
        )
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    after = queue_wait(_metrics(url))
    answered = {row["id"]: row["outcomes"][model] for row in rows if model in row["outcomes"]}
    missing = [task.id for task in chosen if task.id not in answered]
    if missing:
        raise RuntimeError(f"{len(missing)} tasks have no outcome, the first is {missing[0]}")
    score = np.array([answered[task.id]["score"] for task in chosen])
    cost = np.array([answered[task.id].get("cost") or 0.0 for task in chosen])
    wait = (after[0] - before[0]) / max(1.0, after[1] - before[1])
    report.reach += [
        within("mean score", quality_interval(predicted), float(score.mean())),
        within("mean cost", cost_interval(predicted, cost), float(cost.mean())),
        TargetCheck("mean wait in queues and for swaps, s, at most", wait_s, wait, wait <= wait_s),
    ]
    report.facts["served"] = {
        "tasks": len(chosen),
        "preset": model,
        "predicted_score": float(predicted.quality.mean()),
        "score": float(score.mean()),
        "predicted_cost": float(predicted.cost.mean()),
        "cost": float(cost.mean()),
        "predicted_wait_s": swaps_s,
        "wait_s": wait,
    }


def _warm(url: str, expert: str) -> None:
    """Ask an expert once, so that no task waits for an engine that is still starting."""
    body = {"model": expert, "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
        pass


def _swap_times(url: str) -> dict[str, float]:
    """The time of a swap to each expert, by the service's pools."""
    pools = admin(url, "GET", "/admin/experts")["pools"]
    return {
        name: float(state.get("swap_s") or 0.0)
        for states in pools.values()
        for name, state in states.items()
    }


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        return str(reply.read().decode("utf-8", "replace"))
