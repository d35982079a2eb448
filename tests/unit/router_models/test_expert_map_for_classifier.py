"""A map for the categories of a classifier that exists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from router_models import expert_map_for_classifier
from router_models.expert_map_fit import shrunk_cells
from service.broker.thinking_lengths import ThinkingLengths, ThinkingWorth
from service.classifier.classifier import Classifier
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact, save_artifact
from service.cli import cli
from service.config import Config
from service.config.router_presets import PresetsConfig
from service.gateway.request.parsing import parse_request
from service.gateway.routing.quality_cost_frontier import frontier_of
from service.gateway.routing.routing_setup import RoutingSetup

DEMO = Path(__file__).parents[3] / "router_models" / "artifacts" / "demo@1"
PROMPTS = {
    "math": "Tom has {} apples and buys {} more. How many apples does he have now?",
    "code": "Write a Python function that adds {} and {}",
    "intents": "set an alarm for {} tomorrow and a timer for {} minutes",
}
# Categories of the data that mean nothing to the classifier: its posterior tells the prompts apart.
NAMES = {"math": "x", "code": "x", "intents": "y"}
CHANCE = {"base": 0.4, "math": 0.9, "code": 0.9}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes of three experts: `math` and `code` are good at prompts of their own."""
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for category, text in PROMPTS.items():
        for i in range(40):
            outcomes = {}
            for expert, cost in (("base", 1.0), ("math", 2.0), ("code", 2.0)):
                chance = CHANCE[expert] if expert in ("base", category) else 0.1
                right = bool(draw.random() < chance)
                answer = "right" if right else f"wrong {expert}"
                outcomes[expert] = {"score": int(right), "answer": answer, "cost": cost}
            row = {
                "id": f"{category}{i}",
                "prompt": text.format(i + 2, 3 * i + 5),
                "category": NAMES[category],
                "outcomes": outcomes,
            }
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("seed", range(10))
def test_posterior_cells_of_certain_posteriors_equal_shrunk_means(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = draw.random((30, 4))
    values[draw.random((30, 4)) < 0.3] = np.nan
    category = draw.integers(0, 3, 30)
    expected, _ = shrunk_cells(values, category, 3, 7.0)
    assert np.allclose(
        expert_map_for_classifier.posterior_cells(values, np.eye(3)[category], 7.0), expected
    )


@pytest.mark.parametrize("seed", range(10))
def test_posterior_cells_recover_the_map_behind_uncertain_posteriors(seed: int) -> None:
    draw = np.random.default_rng(seed)
    posterior = draw.dirichlet(np.full(4, 0.5), 4000)
    true = draw.random((4, 3))
    values = (draw.random((4000, 3)) < posterior @ true).astype(float)
    found = expert_map_for_classifier.posterior_cells(values, posterior, 5.0)
    assert np.abs(found - true).max() < 0.12
    # A mean weighted by the posterior would be drawn to the overall mean.
    blurred = posterior.T @ values / posterior.sum(axis=0)[:, None]
    assert np.abs(found - true).mean() < np.abs(blurred - true).mean()


def test_posterior_cells_without_rows_are_the_overall_mean() -> None:
    values = np.array([[1.0], [0.0], [0.0], [0.0]])
    posterior = np.tile([1.0, 0.0], (4, 1))
    assert expert_map_for_classifier.posterior_cells(values, posterior, 2.0)[1, 0] == pytest.approx(
        0.25
    )


def test_add_map_keeps_the_classifier_and_judges_held_out(rows: Path, tmp_path: Path) -> None:
    words = ["router", "add-map", "--classifier", str(DEMO), "--outcomes", str(rows)]
    words += ["--source", "made here", "--out", str(tmp_path / "mine@1")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    before, after = load_artifact(DEMO), load_artifact(tmp_path / "mine@1")
    for name, value in before.tensors.items():
        assert np.array_equal(after.tensors[name], value)
    prompt = "What is 17 plus 25?"
    assert Classifier.from_artifact(after).classify(prompt) == Classifier.from_artifact(
        before
    ).classify(prompt)
    found = ExpertMap.from_artifact(after)
    single = {r.members[0]: i for i, r in enumerate(found.recipes) if r.kind == "single"}
    assert set(single) == {"base", "math", "code"}
    for expert in ("math", "code"):
        row = found.score[found.categories.index(expert)]
        assert row[single[expert]] == max(row[i] for i in single.values())
    held_out = after.manifest["map"]["held_out"]
    by_preset = {one["preset"]: one for one in held_out["gains"]}
    # Beside always asking the best single expert, knowing the category must pay.
    assert by_preset["auto:best"]["lead"] > 3 * by_preset["auto:best"]["lead_se"] > 0
    assert by_preset["auto:fast"]["cost"] <= by_preset["auto:best"]["cost"]
    card = (tmp_path / "mine@1" / "README.md").read_text()
    for part in ("Expected gains", "made here", "| general | none of its own |", "best"):
        assert part in card


def test_add_map_records_lengths_and_the_service_prices_calls_by_them(
    rows: Path, tmp_path: Path
) -> None:
    """Experts of one price differ in cost by the lengths of their answers."""
    lengths = {"base": 10, "math": 80, "code": 40}
    path = tmp_path / "rows.jsonl"
    lines = []
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        estimated = 1 + len(row["prompt"]) // 4
        for name, outcome in row["outcomes"].items():
            outcome |= {"prompt_tokens": estimated + 20, "completion_tokens": lengths[name]}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    out = tmp_path / "mine@1"
    expert_map_for_classifier.run(classifier=DEMO, outcomes=[path], out=out, say=lambda _: None)
    one = {"price": {"prompt": 1, "completion": 1}}
    config = Config.model_validate(
        {
            "experts": {name: {"model": name, **one} for name in lengths},
            "router": {"artifact": str(out)},
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    setup = RoutingSetup(config)
    expected = setup.cost_model.expect("math", 10, None)
    assert expected.tokens.round(3).tolist() == list(lengths.values())
    assert (expected.cost * 1e6).round(3).tolist() == [10 + 20 + n for n in lengths.values()]
    found = frontier_of(config, setup)
    assert found.recorded
    names = [recipe.name for recipe in found.recipes]
    base, math = names.index("base"), names.index("math")
    row = found.categories.index("math")
    assert (found.cost[row, math] - found.cost[row, base]) * 1e6 == pytest.approx(70, rel=1e-3)
    # Somewhere between the best and the cheapest the choice for the category changes.
    assert {found.chosen(weight)[row] for weight in (0.0, 1e3)} == {base, math}


def test_add_map_records_lengths_of_thinking_and_the_service_begins_with_them(
    rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = []
    for number, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        # In three rows of ten the recording's bound cut the thinking.
        cut = number % 10 < 3
        row["outcomes"]["math"] |= {
            "completion_tokens": 100 if cut else 90,
            "reasoning_tokens": 100 if cut else number % 10 * 10,
            "finish_reason": "length" if cut else "stop",
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    out = tmp_path / "mine@1"
    expert_map_for_classifier.run(classifier=DEMO, outcomes=[path], out=out, say=lambda _: None)
    config = Config.model_validate(
        {
            "experts": {name: {"model": name} for name in ("base", "math", "code")},
            "router": {"artifact": str(out)},
            "pools": {"cpu": {"engine": "simulated"}},
        }
    )
    recorded = RoutingSetup(config).thinking
    assert {expert for expert, _ in recorded} == {"math"}
    lengths = ThinkingLengths()
    for (expert, category), samples in recorded.items():
        assert len(samples) == expert_map_for_classifier.THINKING_SAMPLES
        assert {n for n in samples if n < 0} <= {-101}
        lengths.seed(expert, category, samples)
    dear = ThinkingWorth(0.5, 1.0)
    assert lengths.budget("math", "math", 0.5, dear) in (60, 70, 80)
    # Beyond the recording's bound nothing is known, so that nothing is bounded.
    assert lengths.budget("math", "math", 0.9, dear) is None
    # What was seen is not seeded again.
    before = lengths.budget("math", "math", 0.5, dear)
    lengths.seed("math", "math", [9000] * 64)
    assert lengths.budget("math", "math", 0.5, dear) == before


def test_presets_of_an_artifact_are_in_force_where_the_config_has_its_experts(
    rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mine@1"
    expert_map_for_classifier.run(classifier=DEMO, outcomes=[rows], out=out, say=lambda _: None)
    made = load_artifact(out)
    told = made.manifest["map"]["presets"]
    assert set(told) == {"fast", "auto", "best"}
    assert told["fast"]["point_cost"] <= told["auto"]["point_cost"] <= told["best"]["point_cost"]
    told["auto"]["point_cost"] = 0.5
    save_artifact(out, made.manifest, made.tensors, "")
    price = {"price": {"prompt": 1, "completion": 1}}
    given = {
        "experts": {name: {"model": name, **price} for name in ("base", "math", "code")},
        "router": {"artifact": str(out)},
        "pools": {"cpu": {"engine": "simulated"}},
    }

    def weight(config: Config) -> float:
        setup = RoutingSetup(config)
        data = {"model": "auto", "messages": [{"role": "user", "content": "What is 17 plus 25?"}]}
        asked = parse_request("/v1/chat/completions", json.dumps(data).encode(), {}, 1000)
        shown = frontier_of(config, setup).to_json(config)["presets"]["auto"]["cost_weight"]
        planned = setup.planner.plan(asked).cost_weight
        assert planned == shown
        return planned

    config = Config.model_validate(given)
    assert weight(config) == pytest.approx(0.01 / 0.5)
    own = {**given, "router": {"artifact": str(out), "presets": {"auto": {"point_cost": 0.1}}}}
    assert weight(Config.model_validate(own)) == pytest.approx(0.01 / 0.1)
    # Prices that were chosen with another expert beside them do not fit.
    given["experts"] = {name: given["experts"][name] for name in ("base", "math")}
    assert weight(Config.model_validate(given)) == PresetsConfig().auto.cost_weight


def test_add_map_of_prompts_that_are_all_new_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "жщю " * 9, "outcomes": {"a": {"score": 1, "cost": 1}}}
    path.write_text(json.dumps(row))
    words = ["router", "add-map", "--classifier", str(DEMO), "--outcomes", str(path)]
    done = CliRunner().invoke(cli, [*words, "--out", str(tmp_path / "mine@1")])
    assert done.exit_code == 1
    assert "knows none of the prompts" in done.output


def test_add_map_of_a_recipe_s_outcomes_gives_the_recipe_its_quality(
    rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    lines = []
    for number, line in enumerate(rows.read_text().splitlines()):
        row = json.loads(line)
        for name, score in (("council", 1.0), ("panel", float(number % 2))):
            row["outcomes"][name] = {"score": score, "answer": "x", "cost": 9.0, "recipe": True}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines))
    out = tmp_path / "mine@1"
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"base": 1, "math": 1, "code": 1, "council": 9, "panel": 9}))
    expert_map_for_classifier.run(
        classifier=DEMO, outcomes=[path], costs=costs, out=out, say=lambda _: None
    )
    found = ExpertMap.from_artifact(load_artifact(out))
    assert all(r.kind == "single" for r in found.recipes if "council" in r.experts)
    one = {"price": {"prompt": 1, "completion": 1}}
    names = ["base", "math", "code"]
    config = Config.model_validate(
        {
            "experts": {name: {"model": name, **one} for name in names},
            "router": {"artifact": str(out)},
            "pools": {"cpu": {"engine": "simulated"}},
            "recipes": {
                "council": {"kind": "deliberate", "members": names},
                "panel": {"kind": "recruit", "recruit": {"k": 2, "among": names}},
            },
        }
    )
    setup = RoutingSetup(config)
    data = {"model": "auto", "messages": [{"role": "user", "content": "What is 17 plus 25?"}]}
    asked = parse_request("/v1/chat/completions", json.dumps(data).encode(), {}, 1000)
    plan = setup.planner.plan(asked)
    quality = dict(zip(plan.rows.tolist(), plan.quality.tolist(), strict=True))
    rows_of = {
        name: setup.catalog.recipe_index[config.recipes[name].recipe()] for name in config.recipes
    }
    assert quality[rows_of["council"]] == pytest.approx(1.0, abs=0.01)
    assert quality[rows_of["panel"]] == pytest.approx(0.5, abs=0.2)
    # Its first reviews are not forgotten, though the map knows nothing of them.
    assert plan.escalation_prob[plan.rows.tolist().index(rows_of["council"]), 0] == 1.0
