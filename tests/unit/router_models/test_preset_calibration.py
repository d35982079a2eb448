"""The calibration of presets: the defaults, and the command on made-up outcomes."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from router_models.cli import group
from service.config.router_presets import AutoPresetConfig, BestPresetConfig, FastPresetConfig
from tests.unit.router_models.test_router_fit import COSTS, rows


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
    # A price of its own keeps quality within a point on folds that did not choose it.
    own = one["own"]
    assert own["lead"] > -1
    assert own["lead_interval"][0] <= own["lead"] <= own["lead_interval"][1]
    assert own["cost_interval"][0] <= own["cost"] <= own["cost_interval"][1]
    bounds = one["least_costs"]
    assert bounds["prompt by prompt"] <= bounds["by category"] <= bounds["always alike"] <= 1
    assert bounds["prompt by prompt"] < one["cost"]
    weights = [found[name]["kappa"] for name in ("fast", "auto", "best")]
    assert weights == sorted(weights, reverse=True)
    text = runner.invoke(group, words).stdout
    assert "by prices of its own, chosen on other folds:" in text
    assert "by category" in text
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
