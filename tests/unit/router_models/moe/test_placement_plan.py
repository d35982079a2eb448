"""`coe moe place`: from recorded loads to a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from router_models.moe.placement_plan import PlacementError, make_plan, read_loads, vllm_options
from service.cli.moe import moe

HOT = [[40, 30, 20, 10, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]]


def recorded(folder: Path, loads: Any = HOT) -> Path:
    path = folder / "loads.json"
    rows = [{"layer": 2 * i + 1, "load": load, "sch": None} for i, load in enumerate(loads)]
    path.write_text(json.dumps({"expert": "m", "layers": rows[::-1], "tokens": 9}))
    return path


def place(*words: object) -> Any:
    return CliRunner().invoke(moe, ["place", *map(str, words)])


def test_place_command_plans_writes_and_prints(tmp_path: Path) -> None:
    loads, out = recorded(tmp_path), tmp_path / "placement.json"
    result = place("--loads", loads, "--devices", 2, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data == json.loads(out.read_text())
    assert data["format"] == "coe.placement/1"
    ways = {way["name"]: way for way in data["ways"]}
    # By hand: neighbours together are 100 of 104, and 26 of 36; half of each is 52 and 18.
    assert ways["linear"]["cost"] == pytest.approx((100 + 26) / (52 + 18))
    assert ways["linear"]["worst_layer"] == pytest.approx(100 / 52)
    assert ways["round_robin"]["cost"] == pytest.approx((62 + 20) / (52 + 18))
    assert ways["longest first"]["cost"] == pytest.approx(1)
    assert [layer["layer"] for layer in data["layers"]] == [1, 3]
    for layer, load in zip(data["layers"], HOT, strict=True):
        assert sorted(e for held in layer["devices"] for e in held) == list(range(8))
        assert layer["load"] == [sum(load[e] for e in held) for held in layer["devices"]]
    assert data["vllm"] == {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "enable_eplb": True,
    }
    assert "exists already" in str(place("--loads", loads, "--devices", 2, "--out", out).exception)


def test_plan_placement_replicates_one_hot_expert(tmp_path: Path) -> None:
    layers, loads = read_loads(recorded(tmp_path, [[97, 1, 1, 1, 1, 1]]))
    plain = make_plan(layers, loads, devices=2, clock=lambda: 0.0)
    copied = make_plan(layers, loads, devices=2, replicas=2, clock=lambda: 0.0)
    assert plain.best.cost == pytest.approx(99 / 51)
    assert copied.best.cost < 1.03
    assert all(0 in held for held in copied.best.layers[0].devices)
    assert vllm_options(copied)["eplb_config"] == {"num_redundant_experts": 2}


def test_plan_placement_leaves_a_balanced_load_alone(tmp_path: Path) -> None:
    layers, loads = read_loads(recorded(tmp_path, [[5, 5, 5, 5]] * 3))
    plan = make_plan(layers, loads, devices=2, clock=lambda: 0.0)
    assert plan.best.name == "linear"
    assert vllm_options(plan) == {
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "expert_placement_strategy": "linear",
    }


def test_plan_placement_without_time_uses_the_heuristic(tmp_path: Path) -> None:
    chance = np.random.default_rng(3).integers(1, 100, (2, 8)).tolist()
    layers, loads = read_loads(recorded(tmp_path, chance))
    hurried = make_plan(layers, loads, devices=2, time_limit_s=0, clock=lambda: 0.0)
    plan = make_plan(layers, loads, devices=2, clock=lambda: 0.0)
    exact = plan.ways[-1]
    assert exact.name == "exact"
    assert exact.exact == 2
    assert all(way.exact == 0 for way in hurried.ways)
    assert exact.cost <= min(way.cost for way in hurried.ways)


def test_plan_placement_table_names_what_vllm_accepts(tmp_path: Path) -> None:
    result = place("--loads", recorded(tmp_path), "--devices", 2, "--replicas", 2)
    assert result.exit_code == 0, result.output
    assert "8 experts, 2 copies on 2 devices, 2 layers" in result.output
    assert "vLLM takes no map of experts to devices" in result.output
    assert "num_redundant_experts: 2" in result.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected"),
        ('{"layers": []}', "no layers in it"),
        ('{"layers": [{"layer": 0}]}', "expected"),
        ('{"layers": [{"layer": 0, "load": [1, "x"]}]}', "expected"),
        ('{"layers": [{"layer": 0, "load": 7}]}', "layer 0 has loads ()"),
        ('{"layers": [{"layer": 0, "load": [[1, 2]]}]}', "layer 0 has loads"),
        ('{"layers": [{"layer": 0, "load": [1, 2]}, {"layer": 4, "load": [1]}]}', "layer 4 has"),
        ('{"layers": [{"layer": 3, "load": [1, -2]}]}', "layer 3: loads are finite numbers"),
        ('{"layers": [{"layer": 3, "load": [1, NaN]}]}', "layer 3: loads are finite numbers"),
        ('{"layers": [{"layer": 3, "load": [0, 0]}]}', "layer 3 has no load; record"),
    ],
)
def test_plan_placement_unreadable_loads_raise(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "loads.json"
    path.write_text(text)
    with pytest.raises(PlacementError) as caught:
        read_loads(path)
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_plan_placement_indivisible_experts_raise(tmp_path: Path) -> None:
    layers, loads = read_loads(recorded(tmp_path))
    with pytest.raises(PlacementError, match="8 experts can't be spread evenly over 3 devices"):
        make_plan(layers, loads, devices=3, clock=lambda: 0.0)
    assert make_plan(layers, loads, devices=3, replicas=1, clock=lambda: 0.0).best.cost >= 1
