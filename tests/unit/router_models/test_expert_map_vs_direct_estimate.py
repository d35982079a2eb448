"""The trial runs on small made-up files, and its statistics are right."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from router_models import expert_map_vs_direct_estimate
from router_models.fit_settings import Settings
from service.classifier.hashed_ngrams import FeatureSpec

SETTINGS = Settings(spec=FeatureSpec(bits=10, known_bits=14), inner_folds=2)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


def test_interval_covers_the_mean_and_shrinks_with_rows() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (100, 1600):
        values = rng.normal(0.3, 1, count)
        low, high = expert_map_vs_direct_estimate.interval(values)
        assert low < values.mean() < high
        widths.append(high - low)
    assert widths[0] == pytest.approx(4 * widths[1], rel=0.3)


def test_interval_weighs_strata_alike() -> None:
    values = np.concatenate([np.zeros(1000), np.ones(10)])
    assert expert_map_vs_direct_estimate.interval(values, ["a"] * 1000 + ["b"] * 10) == (0.5, 0.5)


def test_routerdc_prints_both_tables_and_intervals(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = {"gsm8k": "add cows", "cmmlu": "变压器温度", "mmlu": "law court"}
    rows: list[dict[str, object]] = [
        {
            "id": f"{task}-train/{i}",
            "prompt": f"{words[task]} {rng.integers(1000)} {i}",
            "outcomes": {
                name: {"score": float(rng.random() < (0.9 if best == task else 0.3))}
                for name, best in (("x", "gsm8k"), ("y", "cmmlu"), ("z", "mmlu"))
            },
        }
        for i in range(60)
        for task in words
    ]
    write(tmp_path / "routerdc_train.jsonl.gz", rows)
    (tmp_path / "routerdc_costs.json").write_text('{"x": 1, "y": 1, "z": 1}')
    said: list[str] = []
    expert_map_vs_direct_estimate.routerdc(tmp_path, said.append, SETTINGS)
    row = next(
        line for line in said if line.startswith(f"  {expert_map_vs_direct_estimate.CHOSEN} ")
    )
    mean, *tasks = map(float, row.removeprefix(f"  {expert_map_vs_direct_estimate.CHOSEN}").split())
    assert mean == pytest.approx(np.mean(tasks), abs=0.02)
    assert min(tasks) > 60  # each has an expert that is right on 90 %
    assert sum("in domain" in line for line in said) == 1
    assert sum(f"less {expert_map_vs_direct_estimate.PLAIN}" in line for line in said) == 2
    assert [p for p in tmp_path.iterdir() if "@" in p.name] == []


def test_mmlu_pro_compares_the_variants_at_each_budget(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    experts = sorted({e for pool in expert_map_vs_direct_estimate.POOLS.values() for e in pool})
    rows: list[dict[str, object]] = [
        {
            "id": str(i),
            "prompt": f"{('law court', 'add cows')[i % 2]} {i}",
            "category": ("law", "math")[i % 2],
            "outcomes": {
                name: {
                    "score": int(right := bool(rng.random() < 0.4 + 0.1 * (e % 5))),
                    "answer": "A" if right else str(rng.choice(list("BCD"))),
                }
                for e, name in enumerate(experts)
            },
        }
        for i in range(60)
    ]
    write(tmp_path / "mmlu_pro_dev.jsonl.gz", rows)
    costs = {name: 1.0 + 10 * e for e, name in enumerate(experts)}
    (tmp_path / "active_params_b.json").write_text(json.dumps({"mmlu_pro_dev": costs}))
    said: list[str] = []
    expert_map_vs_direct_estimate.mmlu_pro(tmp_path, said.append, SETTINGS)
    compared = [line for line in said if " to " in line]
    assert len(compared) == sum(map(len, expert_map_vs_direct_estimate.BUDGETS.values()))
