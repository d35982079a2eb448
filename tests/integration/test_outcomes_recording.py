"""`coe outcomes` against a running service."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.cli import cli
from tests.support.answer_gate import held_answers
from tests.support.in_process_service import chat, run_gateway, simulated
from tests.support.polling import until

EXPERTS = {
    "general": {
        "model": "m",
        "categories": ["general"],
        "price": {"prompt": 100_000, "completion": 200_000},
    },
    "math": {"model": "n", "price": {"prompt": 200_000, "completion": 400_000}},
}


def prompts(path: Path, count: int) -> Path:
    """A file of prompts that the simulated engine answers right, as only `general`."""
    check = {"kind": "contains_all", "texts": ["general"]}
    rows = [{"prompt": f"p {i}", "category": "c", "check": check} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


async def coe(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, words)


async def record(url: str, folder: Path, count: int, *more: str) -> Result:
    return await coe(
        *("outcomes", "record", "--prompts", str(prompts(folder / "p.jsonl", count))),
        *("--base-url", url, "--experts", "all", "--out", str(folder / "out.jsonl"), *more),
    )


async def test_outcomes_of_all_experts_are_recorded_and_shown(tmp_path: Path) -> None:
    config = simulated({"cpu": {"tokens": 6}}, experts=EXPERTS)
    async with run_gateway(config) as s:
        result = await record(s.url, tmp_path, 5, "--max-tokens", "5")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        general, math = row["outcomes"]["general"], row["outcomes"]["math"]
        assert (general["score"], math["score"]) == (1.0, 0.0)
        assert general["completion_tokens"] == 5
        assert general["finish_reason"] == "length"
        assert general["cost"] == pytest.approx(0.1 * (general["prompt_tokens"] + 2 * 5))
        assert math["cost"] == pytest.approx(0.2 * (math["prompt_tokens"] + 2 * 5))
    shown = await coe("outcomes", "show", str(tmp_path / "out.jsonl"), "--json")
    cells = [json.loads(line) for line in shown.output.splitlines()]
    scores = {(cell["expert"], cell["category"]): cell["score"] for cell in cells}
    assert scores == {
        ("general", "c"): 1.0,
        ("general", "all"): 1.0,
        ("math", "c"): 0.0,
        ("math", "all"): 0.0,
    }


async def test_outcomes_bound_on_cost_holds_by_the_prices_that_the_service_tells(
    tmp_path: Path,
) -> None:
    config = simulated({"cpu": {"tokens": 6}}, experts=EXPERTS)
    async with run_gateway(config) as s:
        result = await record(s.url, tmp_path, 100, "--max-tokens", "5", "--max-cost", "300")
        assert result.exit_code == 1
        assert "bound on cost" in result.output
        count = sum(len(engine.asked) for engine in s.pools["cpu"].engines)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    outcomes = [outcome for row in rows for outcome in row["outcomes"].values()]
    assert 0 < len(outcomes) == count < 200
    assert sum(outcome["cost"] for outcome in outcomes) <= 300


async def test_outcomes_are_recorded_behind_other_requests(tmp_path: Path) -> None:
    config = simulated({"cpu": {"max_num_seqs": 1}}, experts={"general": EXPERTS["general"]})
    async with run_gateway(config) as s:
        pool = s.pools["cpu"]
        with held_answers() as gate:
            recording = asyncio.create_task(
                record(s.url, tmp_path, 8, "--concurrency", "8", "--max-tokens", "10")
            )
            await until(lambda: pool.waiting == 7, "the recording's requests wait")
            asking = asyncio.create_task(s.ask(chat("somebody waits")))
            await until(lambda: pool.waiting == 8, "another one waits")
            gate.open()
            assert (await asking)[0] == 200
            result = await recording
    assert result.exit_code == 0, result.output
    order: list[Any] = [
        json.loads(item.body)["messages"][0]["content"] for item in pool.engine.asked
    ]
    assert len(order) == 9
    # Without classes it would be the last one.
    assert order.index("somebody waits") < 7


async def test_outcomes_errors_are_one_line(tmp_path: Path) -> None:
    config = simulated({"cpu": {}}, experts=EXPERTS)
    async with run_gateway(config) as s:
        file = str(prompts(tmp_path / "p.jsonl", 1))
        out = str(tmp_path / "out.jsonl")
        result = await coe(
            *("outcomes", "record", "--prompts", file, "--base-url", s.url),
            *("--experts", "general,nobody", "--out", out),
        )
        assert result.exit_code == 1
        assert "has no nobody; it has auto, general, math" in result.output
    assert os.listdir(tmp_path) == ["p.jsonl"]
