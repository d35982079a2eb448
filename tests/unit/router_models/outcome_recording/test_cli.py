"""The commands: a recording that is killed, what they refuse, and what they show."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from router_models.outcome_recording.cli import group, key_for
from router_models.outcome_recording.outcome_file import read_rows
from tests.support.polling import until
from tests.unit.router_models.outcome_recording.conftest import Upstream


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COE_URL", "COE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def prompts(path: Path, count: int = 4, **more: Any) -> str:
    rows = [
        {
            "prompt": f"say {i}",
            "category": f"c{i % 2}",
            "check": {"kind": "regex", "pattern": str(i)},
        }
        | more
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


async def run(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, group, words)


def words_of(upstream: Upstream, folder: Path, count: int, *more: str) -> tuple[str, ...]:
    file = prompts(folder / "p.jsonl", count)
    out = ("--out", str(folder / "out.jsonl"), "--base-url", upstream.url)
    return ("record", "--prompts", file, "--experts", "all", *out, *more)


async def test_record_killed_leaves_whole_lines_and_continues(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.delay_s = 0.01
    out = tmp_path / "out.jsonl"
    words = words_of(upstream, tmp_path, 60, "--concurrency", "4")
    for _ in range(2):
        enough = len(upstream.asked) + 30
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.cli", "outcomes", *words),
            env={**os.environ, "PYTHONPATH": os.getcwd()},
            stderr=asyncio.subprocess.DEVNULL,
        )
        await until(partial(upstream.has, enough), "30 requests", 60)
        process.send_signal(signal.SIGKILL)
        await process.wait()
        lines = out.read_bytes().split(b"\n")
        assert lines[-1] == b""
        assert all(isinstance(json.loads(line), dict) for line in lines[:-1])
    kept = {(row["prompt"], name) for row in read_rows(out) for name in row["outcomes"]}
    assert len(kept) >= 40
    before = upstream.tries.copy()
    result = await run(*words)
    assert result.exit_code == 0, result.output
    again = upstream.tries - before
    assert not any((name, prompt) in again for prompt, name in kept)
    assert {(row["prompt"], name) for row in read_rows(out) for name in row["outcomes"]} == {
        (f"say {i}", name) for i in range(60) for name in ("a", "b")
    }
    assert len(read_rows(out)) == 60
    # Only what was in flight at a kill was asked twice.
    assert sum(count - 1 for count in upstream.tries.values()) <= 2 * 4


async def test_record_two_at_once_are_refused(upstream: Upstream, tmp_path: Path) -> None:
    upstream.gate = asyncio.Event()
    words = words_of(upstream, tmp_path, 2)
    first = asyncio.create_task(run(*words))
    await until(lambda: upstream.asked, "the first one asks")
    second = await run(*words)
    assert second.exit_code == 1
    assert "another recording writes to it" in second.output
    upstream.gate.set()
    assert (await first).exit_code == 0


async def test_record_takes_categories_and_a_limit(upstream: Upstream, tmp_path: Path) -> None:
    more = ("--categories", "c1", "--limit", "2")
    result = await run(*words_of(upstream, tmp_path, 10, *more))
    assert result.exit_code == 0, result.output
    assert sorted(row["prompt"] for row in read_rows(tmp_path / "out.jsonl")) == ["say 1", "say 3"]
    result = await run(*words_of(upstream, tmp_path, 10, "--categories", "c9"))
    assert "no prompt has the category c9; there are c0, c1" in result.output


async def test_record_sends_its_key_only_where_it_belongs(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_API_KEY", "sk-own")
    monkeypatch.setenv("OTHER", "sk-other")
    for more, key in (((), b"Bearer sk-own"), (("--key-env", "OTHER"), b"Bearer sk-other")):
        await run(*words_of(upstream, tmp_path, 1, *more))
        assert upstream.headers[-1][b"authorization"] == key
    result = await run(*words_of(upstream, tmp_path, 1, "--key-env", "UNSET_HERE"))
    assert "UNSET_HERE is not set" in result.output
    assert "sk-" not in (tmp_path / "out.jsonl").read_text()


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:1/v1", True),
        ("https://coe.example", True),
        ("https://api.example/v1", False),
        ("https://127.0.0.1.example", False),
        ("https://127.0.0.1@api.example", False),
    ],
)
def test_key_for_is_this_service_s_own_only_there(
    url: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_URL", "https://coe.example")
    monkeypatch.setenv("COE_API_KEY", "sk-own")
    assert key_for(url, None) == ("sk-own" if own else None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--experts", "a,x,y"), "has no x, y; it has auto, a, b"),
        (("--experts", ","), "at least one name"),
        (("--base-url", "ftp://x"), "is no URL"),
        (("--base-url", "http://127.0.0.1:9"), "cannot reach"),
        (("--judge", "z"), "has no z"),
        (("--out", "x.jsonl.gz"), "can't be compressed"),
        (("--prompts", "/nowhere.jsonl"), "No such file"),
        (("--prices", "/nowhere.json"), "No such file"),
    ],
)
async def test_record_refuses_with_one_message(
    upstream: Upstream, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    result = await run(*words_of(upstream, tmp_path, 2, *more))
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


async def test_record_bound_on_cost_needs_prices(upstream: Upstream, tmp_path: Path) -> None:
    upstream.price = None
    words = words_of(upstream, tmp_path, 20, "--max-cost", "0.0013", "--max-tokens", "5")
    result = await run(*words)
    assert "--max-cost needs the price of a, b" in result.output
    prices = tmp_path / "prices.json"
    prices.write_text('{"a": {"prompt": 1}}')
    assert "expected {" in (await run(*words, "--prices", str(prices))).output
    price = {"prompt": 1.0, "completion": 1.0}
    prices.write_text(json.dumps({"a": price, "b": price}))
    result = await run(*words, "--prices", str(prices))
    assert "bound on cost" in result.output
    assert result.exit_code == 1
    costs = [o["cost"] for r in read_rows(tmp_path / "out.jsonl") for o in r["outcomes"].values()]
    assert costs
    assert sum(costs) <= 0.0013


async def test_record_leaves_out_what_can_t_be_checked_here(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_sandbox() -> str:
        return "namespaces are not allowed"

    monkeypatch.setattr("router_models.outcome_recording.sandboxed_unit_tests.probe", no_sandbox)
    words = words_of(upstream, tmp_path, 2)
    other = tmp_path / "more.jsonl"
    prompts(other, 3, check={"kind": "unit_tests", "tests": ["assert f() == 1"]})
    judged = tmp_path / "judged.jsonl"
    prompts(judged, 1, id="j", check={"kind": "judge", "rubric": "good"})
    for i, line in enumerate(rows := other.read_text().splitlines()):
        rows[i] = json.dumps(json.loads(line) | {"id": f"u{i}"})
    other.write_text("\n".join(rows))
    result = await run(*words, "--prompts", str(other), "--prompts", str(judged))
    assert result.exit_code == 0, result.output
    reason = "there is no sandbox on this machine: namespaces are not allowed"
    assert f"left out 3 prompts with the check unit_tests: {reason}" in result.output
    assert "left out 1 prompts with the check judge: give --judge EXPERT" in result.output
    assert len(read_rows(tmp_path / "out.jsonl")) == 2
    result = await run(
        *("record", "--prompts", str(judged), "--experts", "a", "--base-url", upstream.url),
        *("--out", str(tmp_path / "none.jsonl")),
    )
    assert "no prompt is left" in result.output


async def test_record_needs_prompts() -> None:
    result = await run("record", "--experts", "a", "--out", "x.jsonl")
    assert result.exit_code == 2
    assert "--prompts FILE or --builtin" in result.output


def row(identity: str, **more: Any) -> dict[str, Any]:
    return {"id": identity, "prompt": f"p{identity}", "category": "c", "outcomes": {}} | more


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_show_has_a_line_for_each_expert_and_category(tmp_path: Path) -> None:
    outcome = {"score": 1, "prompt_tokens": 3, "completion_tokens": 5, "cost": 0.25}
    file = write(
        tmp_path / "a.jsonl",
        [
            row("1", outcomes={"a": outcome, "b": {"score": 0.5}}),
            row("2", outcomes={"a": {"score": 0}}, errors={"b": {"code": "x", "message": "m"}}),
        ],
    )
    result = CliRunner().invoke(group, ["show", file])
    lines = [line.split() for line in result.output.splitlines()]
    assert lines[0][:3] == ["expert", "category", "score"]
    assert lines[1] == ["a", "c", "0.500", "0.09–0.91", "2", "3", "+", "5", "0.25", "–", "–"]
    assert lines[4] == ["b", "all", "0.500", "0.05–0.95", "1", "1", "–", "+", *"––––"]
    result = CliRunner().invoke(group, ["show", file, "--by", "expert", "--json"])
    cells = [json.loads(line) for line in result.output.splitlines()]
    assert [(cell["expert"], cell["category"], cell["failed"]) for cell in cells] == [
        ("a", "all", 0),
        ("b", "all", 1),
    ]


def test_merge_joins_rows_and_lets_later_files_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [row("1", outcomes={"a": {"score": 0}}), row("2")])
    second = write(
        tmp_path / "b.jsonl", [row("1", outcomes={"a": {"score": 1}, "b": {"score": 1}}), row("3")]
    )
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(group, ["merge", first, second, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "3 rows, 2 outcomes, 1 replaced" in result.output
    rows = {item["id"]: item["outcomes"] for item in read_rows(out)}
    assert rows == {"1": {"a": {"score": 1}, "b": {"score": 1}}, "2": {}, "3": {}}
    result = CliRunner().invoke(group, ["merge", first, "--out", str(out)])
    assert "--force replaces it" in result.output
    assert CliRunner().invoke(group, ["merge", first, "--out", str(out), "--force"]).exit_code == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "other"}, "different prompts"),
        ({"check": "x"}, "another `check`"),
        ({"asked": {"temperature": 1}}, "another `asked`"),
    ],
)
def test_merge_refuses_rows_that_can_t_be_compared(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    first = write(tmp_path / "a.jsonl", [row("1")])
    second = write(tmp_path / "b.jsonl", [row("1") | changed])
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(group, ["merge", first, second, "--out", str(out)])
    assert result.exit_code == 1
    assert message in result.output
    assert "b.jsonl" in result.output
    assert not out.exists()
