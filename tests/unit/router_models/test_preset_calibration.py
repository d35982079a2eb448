"""The calibration of presets: rules on made-up frontiers, and the command on made-up outcomes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from router_models.cli import group
from router_models.preset_calibration import (
    KAPPAS,
    MAX_POINT_COST,
    RULES,
    Played,
    Rule,
    choose,
    point_cost,
)
from service.config.router_presets import AutoPresetConfig, BestPresetConfig, FastPresetConfig
from tests.unit.router_models.test_router_fit import COSTS, rows


def played(loss: float, gain: float = 0.0) -> Played:
    """Twenty rows on which κ loses `loss` points a κ of 0.1, from `gain` points above the best."""
    score = 0.5 + (gain - loss * 10 * KAPPAS) / 100
    half = np.arange(20) % 2 == 0
    return Played(
        name="made up",
        best="large",
        chosen_on=half,
        prompts=np.arange(20),
        score=np.repeat(score[:, None], 20, axis=1),
        cost=np.repeat((1 - KAPPAS / 2)[:, None], 20, axis=1),
        best_score=np.full(20, 0.5),
        best_cost=np.ones(20),
    )


@pytest.mark.parametrize(
    ("losses", "rule", "kappa"),
    [
        ([(10.0, 0.0)], Rule(1.0), 0.01),
        # The data set that loses most decides.
        ([(10.0, 0.0), (1.0, 0.0)], Rule(1.0), 0.01),
        # A router above the best single expert may give that up as well, unless the peak counts.
        ([(10.0, 4.0)], Rule(1.0), 0.05),
        ([(10.0, 4.0)], Rule(1.0, of_peak=True), 0.01),
        # Nothing passes: cost has no weight.
        ([(10.0, -3.0)], Rule(1.0), 0.0),
    ],
)
def test_choose_takes_the_greatest_saving_within_the_rule(
    losses: list[tuple[float, float]], rule: Rule, kappa: float
) -> None:
    found = KAPPAS[choose([played(*one) for one in losses], rule)]
    below = KAPPAS[kappa + 1e-12 >= KAPPAS]
    assert found == below[-1]


def test_choose_reads_no_row_that_is_kept_apart() -> None:
    one = played(10.0, 2.0)
    noise = np.where(one.chosen_on, 0.0, np.random.default_rng(0).normal(size=one.score.shape))
    other = replace(one, score=one.score + noise)
    for rule in RULES.values():
        assert choose([one], rule) == choose([other], rule)


@pytest.mark.parametrize(
    ("kappa", "share"),
    [(0.05, 0.2), (0.0464, 0.22), (0.1468, 0.069), (0.00464, 2.2), (0.01, 1.0), (0.0, 1000.0)],
)
def test_point_cost_is_rounded_up_to_two_digits(kappa: float, share: float) -> None:
    assert point_cost(kappa) == pytest.approx(share)
    assert point_cost(kappa) <= MAX_POINT_COST


def test_default_presets_give_up_no_more_than_the_calibration_chose() -> None:
    """docs/concepts/prices.md has the run: κ = 0.147, 0.0464 and 0.0046."""
    chosen = {"fast": 0.1468, "auto": 0.04642, "best": 0.00464 * 1.1}
    defaults = {
        "fast": FastPresetConfig(),
        "auto": AutoPresetConfig(),
        "best": BestPresetConfig(),
    }
    for name, preset in defaults.items():
        assert 0.8 * chosen[name] <= preset.cost_weight <= chosen[name]


def test_calibrate_command_reports_rows_apart_and_a_section_of_the_config(tmp_path: Path) -> None:
    outcomes, costs = tmp_path / "rows.jsonl", tmp_path / "costs.json"
    outcomes.write_text("".join(json.dumps(row) + "\n" for row in rows(900, 1)))
    costs.write_text(json.dumps(COSTS))
    words = ["calibrate", "--data", "mine", str(outcomes), str(costs), "all"]
    runner = CliRunner()
    result = runner.invoke(group, [*words, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["fast", "auto", "best"]
    one = found["auto"]["sets"]["mine"]
    assert one["best"] == "large"
    assert 0 < one["rows"] < 900
    # `maths` is always right on sums at a tenth of the cost.
    assert one["lead"] > -2
    assert one["cost"] < 0.76
    weights = [found[name]["kappa"] for name in ("fast", "auto", "best")]
    assert weights == sorted(weights, reverse=True)
    text = runner.invoke(group, words).stdout
    assert f"    auto: {{point_cost: {found['auto']['point_cost']:g}}}" in text.splitlines()


def test_calibrate_command_refuses_unknown_experts(tmp_path: Path) -> None:
    outcomes, costs = tmp_path / "rows.jsonl", tmp_path / "costs.json"
    outcomes.write_text(json.dumps(rows(1, 1)[0]) + "\n")
    costs.write_text(json.dumps(COSTS))
    result = CliRunner().invoke(
        group, ["calibrate", "--data", "mine", str(outcomes), str(costs), "nobody"]
    )
    assert result.exit_code == 1
    assert "nobody" in result.stderr
