"""`coe batch` against a running service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.cli import cli
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


def test_progress_tells_the_time_to_go_by_the_lines_so_far() -> None:
    batch = {
        "status": "in_progress",
        "in_progress_at": 100,
        "request_counts": {"total": 40, "completed": 9, "failed": 1},
        "usage": {"total_tokens": 70},
        "coe": {"cost": 0.5},
    }
    found = Progress.of(batch, 120.0)
    assert found.left_s == 60.0
    assert found.text == "10/40 lines, 1 failed, 70 tokens, cost 0.5, 1 min 0 s to go"
