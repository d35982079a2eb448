"""`coe batch` against a running service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.cli import cli
from service.cli.batch import progress
from service.cli.batch.progress import Progress, duration
from service.errors import CoeError
from tests.integration.test_batch_planning import body, config, whole
from tests.support.in_process_service import run_gateway


async def coe(url: str, *words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli, ["batch", "--url", url, *words])


async def test_batch_commands_from_plan_to_result(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text("\n".join(whole(i, body(i)) for i in range(12)) + "\n")
    async with run_gateway(config(tmp_path)) as s:
        planned = await coe(s.url, "plan", str(given))
        assert planned.exit_code == 0, planned.output
        assert "12 lines" in planned.output
        assert "these terms" in planned.output
        curve = json.loads((await coe(s.url, "plan", str(given), "--json")).output)["curve"]
        middle = (curve[0]["cost"] + curve[-1]["cost"]) / 2
        words = ("--max-cost", str(middle), "--deadline", "1h", "--watch")
        made = await coe(s.url, "submit", str(given), *words)
        assert made.exit_code == 0, made.output
        batch_id = made.output.split()[0]
        assert "completed: 12/12 lines" in made.output
        assert batch_id in (await coe(s.url, "list")).output
        watched = json.loads((await coe(s.url, "watch", batch_id, "--json")).output)
        assert watched["coe"]["max_cost"] == middle
        models = watched["coe"]["models"]
        assert sum(model["completed"] for model in models.values()) == 12
        assert sum(model["total"] for model in models.values()) == 12
        spent = sum(model["cost"] for model in models.values())
        assert spent == pytest.approx(watched["coe"]["cost"])
        used = sum(model["input_tokens"] + model["output_tokens"] for model in models.values())
        assert used == watched["usage"]["total_tokens"]
        out = tmp_path / "out.jsonl"
        assert (await coe(s.url, "result", batch_id, "-o", str(out))).exit_code == 0
        assert len(out.read_text().splitlines()) == 12
        printed = await coe(s.url, "result", batch_id)
        assert printed.output == out.read_text()
        late = await coe(s.url, "cancel", batch_id)
        assert isinstance(late.exception, CoeError)


async def test_batch_commands_say_what_is_wrong(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text(whole(0, body(0)) + "\n")
    async with run_gateway(config(tmp_path)) as s:
        for words, message in [
            (("plan", str(given), "--quality", "good"), "--quality takes"),
            (("plan", str(given), "--max-cost", "1e-12"), "cheapest"),
            (("submit", str(given), "--max-cost", "1e-12", "--watch"), "cheapest"),
            (("result", "batch_none"), "no batch"),
            (("cancel", "batch_none"), "no batch"),
        ]:
            found = await coe(s.url, *words)
            assert isinstance(found.exception, CoeError), found.output
            assert message in found.exception.message


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.2, "5 s"), (125, "2 min 5 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


BATCH = {
    "id": "batch_1",
    "status": "in_progress",
    "request_counts": {"total": 40, "completed": 9, "failed": 1},
    "usage": {"total_tokens": 70},
    "coe": {
        "cost": 0.5,
        "seconds_left": 60.0,
        "models": {
            "code": {
                "total": 10,
                "completed": 0,
                "failed": 0,
                "input_tokens": 0,
                "output_tokens": 0,
                "cost": 0.0,
                "seconds_left": 40.0,
            },
            "math": {
                "total": 30,
                "completed": 9,
                "failed": 1,
                "input_tokens": 30,
                "output_tokens": 40,
                "cost": 0.5,
                "seconds_left": 20.0,
            },
        },
    },
}


def test_progress_tells_lines_tokens_cost_and_time_to_go_by_expert() -> None:
    found = Progress.of(BATCH)
    assert found.text == "10/40 lines, 1 failed, 70 tokens, cost 0.5, 1 min 0 s to go"
    assert found.shares == "math 10/30, code 0/10"
    assert [model.text for model in found.models] == [
        "10/30 lines, 1 failed, 70 tokens, cost 0.5, 20 s to go",
        "0/10 lines, 0 tokens, cost 0, 40 s to go",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_watch_shows_every_expert_until_the_end(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LOOK_S", 0.0)
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    states = [BATCH, BATCH, {**BATCH, "status": "completed"}]
    left = iter(states)
    assert progress.watch(lambda: next(left)) == states[-1]
    shown = capsys.readouterr().out
    for text in ("math", "code", "70 tokens", "completed"):
        assert text in shown
    if not terminal:
        # One line for each change.
        lines = shown.splitlines()
        assert len(lines) == 2
        assert lines[0].endswith("(math 10/30, code 0/10)")
