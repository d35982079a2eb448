"""The correction of a map by outcomes from traffic: what moves, and when it is no better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models.outcome_reader import OutcomeError
from router_models.traffic_refit import MapColumns, TrafficRow, mean_costs, read_rows, split
from service.types import Recipe

RECIPES = (
    Recipe("single", ("a",)),
    Recipe("single", ("b",)),
    Recipe("cascade", ("a",), ("b",)),
)
COLUMNS = MapColumns(("math", "tales"), RECIPES)
PRESENT = np.array([[0.8, 0.5, 0.7], [0.5, 0.6, 0.6]])


def rows(count: int, b_wins: float, category: str = "math", level: float = 1.0) -> list[TrafficRow]:
    rng = np.random.default_rng(1)
    made = []
    for i in range(count):
        b = float(rng.random() < b_wins)
        scores = {"a": level * (1 - b), "b": level * b}
        made.append(TrafficRow(category, f"p{i}", scores, {"a": 1.0, "b": 1.0}))
    return made


def test_correction_moves_relative_quality_and_keeps_its_level() -> None:
    found, overall = COLUMNS.correction(PRESENT, rows(400, 0.9))
    assert found[0, 1] - found[0, 0] == pytest.approx(0.8 + 0.3, abs=0.12)
    assert found[0, 0] + found[0, 1] == pytest.approx(0), "no row tells how good both are"
    assert found[0, 2] == pytest.approx(0), "a recipe moves by the mean of its experts"
    assert not found[1].any(), "a category without rows stays"
    assert overall[1] > 0 > overall[0]


def test_correction_by_few_rows_is_small() -> None:
    few, many = (COLUMNS.correction(PRESENT, rows(n, 1.0))[0][0, 1] for n in (2, 500))
    assert 0 < few < 0.15 * many


@pytest.mark.parametrize(("b_wins", "better"), [(0.9, True), (0.5, False), (0.1, False)])
def test_judge_finds_the_better_map_only(b_wins: float, better: bool) -> None:
    correcting, judging = split(rows(600, b_wins), np.random.default_rng(0))
    candidate = PRESENT + COLUMNS.correction(PRESENT, correcting)[0]
    found = COLUMNS.judge(
        PRESENT, candidate, judging, mean_costs(correcting), 0.05, np.random.default_rng(0)
    )
    assert (found.better >= 0.95) == better
    assert found.prompts == len(judging)


def test_judge_of_a_worse_candidate_is_sure_that_it_is_worse() -> None:
    worse = np.array([[0.2, 0.9, 0.5], [0.5, 0.6, 0.6]])
    found = COLUMNS.judge(PRESENT, worse, rows(300, 0.2), {}, 0.05, np.random.default_rng(0))
    assert (found.better, found.changed) == (0.0, 1.0)
    assert found.gain < -0.4


def test_judge_prices_cost() -> None:
    dear = [
        TrafficRow("math", f"p{i}", {"a": 0.5, "b": 0.52}, {"a": 1.0, "b": 9.0}) for i in range(99)
    ]
    candidate = np.array([[0.5, 0.9, 0.5], [0.5, 0.6, 0.6]])
    found = COLUMNS.judge(PRESENT, candidate, dear, mean_costs(dear), 0.1, np.random.default_rng(0))
    assert found.changed == 1.0
    assert found.gain < 0, "two points are not worth nine times the cost"


def test_split_keeps_equal_prompts_in_one_part() -> None:
    twice = [*rows(100, 0.5), *rows(100, 0.5, "tales")]
    correcting, judging = split(twice, np.random.default_rng(3))
    assert not {row.prompt for row in correcting} & {row.prompt for row in judging}
    assert len(correcting) == 120
    assert len(judging) == 80


def test_usable_rows_have_known_categories_and_two_known_experts() -> None:
    given = [
        TrafficRow("math", "1", {"a": 1.0, "stranger": 0.0}, {}),
        TrafficRow("law", "2", {"a": 1.0, "b": 0.0}, {}),
        TrafficRow("math", "3", {"a": 1.0, "b": 0.0, "stranger": 1.0}, {}),
    ]
    assert COLUMNS.usable(given) == [TrafficRow("math", "3", {"a": 1.0, "b": 0.0}, {})]


GOOD: dict[str, Any] = {
    "id": "1",
    "category": "math",
    "outcomes": {"a": {"score": 1, "cost": 2}, "b": {"score": 0}},
}


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["{"], ":1: not a row"),
        ([json.dumps(GOOD), "[]"], ":2: not a row"),
        ([json.dumps({**GOOD, "outcomes": {"a": {"score": 2}}})], ":1: a score"),
        ([json.dumps({**GOOD, "category": None})], "no row has a category"),
        ([], "no row has a category"),
    ],
)
def test_rows_that_can_not_be_used_are_named(tmp_path: Path, lines: list[str], named: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(OutcomeError, match=named):
        read_rows([file])


def test_rows_without_prompts_are_told_apart_by_their_hash(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**GOOD, "prompt_hash": "abc"}) + "\n")
    assert read_rows([file]) == [TrafficRow("math", "abc", {"a": 1.0, "b": 0.0}, {"a": 2.0})]
