"""Recording over real HTTP: rows, resuming, errors, retries, the bound on cost."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router_models.outcome_reader import OutcomeError, costs_of, read_outcomes
from router_models.outcome_recording.endpoint_client import Endpoint
from router_models.outcome_recording.outcome_file import OutcomeFile, join_rows, read_rows
from router_models.outcome_recording.recorder import Progress, Recorder, RecorderSettings, spent_of
from router_models.outcome_recording.task_reader import Task
from service.broker.token_prices import Price
from tests.support.polling import until
from tests.unit.router_models.outcome_recording.conftest import Upstream

PRICES = {name: Price(1000.0, 1000.0) for name in ("a", "b", "j")}  # 1e-3 each token


def tasks(count: int, **more: Any) -> list[Task]:
    return [
        Task.model_validate(
            {
                "id": f"t{i}",
                "prompt": f"say {i}",
                "category": f"c{i % 3}",
                "check": {"kind": "number", "answer": i},
            }
            | more
        )
        for i in range(count)
    ]


def numbers(model: str, prompt: str) -> str:
    """`a` is right, `b` is right about even numbers."""
    number = int(prompt.split()[-1])
    return f"The answer is {number if model == 'a' or number % 2 == 0 else number + 1}."


async def record(
    upstream: Upstream,
    path: Path,
    given: list[Task],
    *,
    timeout_s: float = 30.0,
    prices: dict[str, Price] | None = None,
    **more: Any,
) -> Progress:
    settings = RecorderSettings(**({"experts": ("a", "b"), "max_tokens": 20} | more))
    endpoint = Endpoint(
        upstream.url, key=None, timeout_s=timeout_s, concurrency=settings.concurrency
    )
    async with endpoint:
        with OutcomeFile(path) as file:
            recorder = Recorder(
                endpoint,
                file,
                given,
                settings,
                prices=PRICES if prices is None else prices,
                jitter=random.Random(0),
            )
            return await recorder.run()


async def test_recorder_writes_rows_that_the_fit_reads(upstream: Upstream, tmp_path: Path) -> None:
    upstream.answer = numbers
    out = tmp_path / "out.jsonl"
    progress = await record(upstream, out, tasks(10), concurrency=3)
    assert (progress.done, progress.total, progress.failed) == (20, 20, 0)
    assert 1 < upstream.most_at_once <= 3
    rows = read_rows(out)
    assert len(rows) == 10
    outcome = join_rows(rows)["t3"]["outcomes"]["b"]
    seconds = outcome.pop("seconds")
    assert 0 < seconds < 30
    assert outcome == {
        "score": 0.0,
        "answer": "4",
        "output_chars": 16,
        "prompt_tokens": 12,
        "completion_tokens": 4,
        "cost": 0.016,
        "finish_reason": "stop",
    }
    table, skipped = read_outcomes([out], costs_of(None, [out]))
    assert skipped.lines() == []
    order = np.argsort([int(id_[1:]) for id_ in table.ids])
    assert table.score[order].tolist() == [[1.0, float(i % 2 == 0)] for i in range(10)]
    assert set(table.categories) == {"c0", "c1", "c2"}
    assert progress.cost == pytest.approx(upstream.charged)
    assert all(id_["temperature"] == 0.0 and id_["max_tokens"] == 20 for id_ in upstream.asked)
    headers = upstream.headers[-1]
    assert (headers[b"x-coe-priority"], headers[b"x-coe-cache"]) == (b"low", b"off")


async def test_record_keeps_the_thinking_where_the_endpoint_tells_it(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.thought = 3
    out = tmp_path / "out.jsonl"
    await record(upstream, out, tasks(1), concurrency=1)
    outcomes = join_rows(read_rows(out))["t0"]["outcomes"]
    assert [one["reasoning_tokens"] for one in outcomes.values()] == [3, 3]


async def test_recorder_asks_only_what_is_missing(upstream: Upstream, tmp_path: Path) -> None:
    upstream.answer = numbers
    out = tmp_path / "out.jsonl"
    await record(upstream, out, tasks(4), experts=("a",))
    whole = out.read_bytes()
    # A writer that was killed leaves a part of a line; what came before it counts.
    out.write_bytes(whole + whole[: len(whole) // 7])
    await record(upstream, out, tasks(6))
    assert upstream.tries.total() == len(upstream.tries) == 12
    assert all(row["outcomes"].keys() == {"a", "b"} for row in read_rows(out))
    await record(upstream, out, tasks(6))
    assert upstream.tries.total() == 12


async def test_recorder_records_errors_as_errors_and_asks_again(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.answer = lambda model, prompt: 500 if model == "b" else numbers(model, prompt)
    out = tmp_path / "out.jsonl"
    progress = await record(upstream, out, tasks(3), attempts=2)
    assert (progress.done, progress.failed, progress.errors) == (3, 3, {"bad": 3})
    assert upstream.tries["b", "say 0"] == 2
    for row in read_rows(out):
        assert row["outcomes"].keys() == {"a"}
        assert row["errors"] == {"b": {"code": "bad", "message": "bad: no"}}
    upstream.answer = numbers
    progress = await record(upstream, out, tasks(3))
    assert (progress.done, progress.failed) == (6, 0)
    assert not any("errors" in row for row in read_rows(out))
    assert upstream.tries["a", "say 0"] == 1


@pytest.mark.parametrize(("status", "tries"), [(429, 3), (503, 3), (408, 3), (400, 1), (404, 1)])
async def test_recorder_retries_what_may_succeed_later(
    upstream: Upstream, tmp_path: Path, status: int, tries: int
) -> None:
    upstream.answer, upstream.failures, upstream.status = numbers, 2, status
    progress = await record(upstream, tmp_path / "o.jsonl", tasks(1), experts=("a",))
    assert upstream.tries["a", "say 0"] == tries
    assert progress.done == (1 if tries == 3 else 0)


@pytest.mark.parametrize("status", [401, 403])
async def test_recorder_stops_where_no_call_can_succeed(
    upstream: Upstream, tmp_path: Path, status: int
) -> None:
    upstream.answer = lambda model, prompt: status
    progress = await record(upstream, tmp_path / "o.jsonl", tasks(50), concurrency=2)
    assert progress.stopped is not None
    assert upstream.tries.total() <= 2


async def test_recorder_stops_where_nobody_answers(tmp_path: Path, upstream: Upstream) -> None:
    upstream.url = "http://127.0.0.1:9"
    progress = await record(upstream, tmp_path / "o.jsonl", tasks(50), concurrency=2, attempts=1)
    assert "cannot reach" in str(progress.stopped)
    assert progress.failed <= 4
    assert progress.cost == 0.0


async def test_recorder_charges_calls_whose_cost_nobody_knows(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.answer = lambda model, prompt: 5.0
    out = tmp_path / "out.jsonl"
    progress = await record(upstream, out, tasks(1), experts=("a",), timeout_s=1.0, attempts=1)
    # Bytes of the prompt, what a template may add, and the longest answer.
    worst = 1e-3 * (len("say 0") + 1024 + 16 + 20)
    assert progress.cost == pytest.approx(worst)
    upstream.answer = numbers
    progress = await record(upstream, out, tasks(1), experts=("a",))
    (row,) = read_rows(out)
    assert row["outcomes"]["a"]["cost_beside"] == pytest.approx(worst)
    assert spent_of([row]) == pytest.approx(progress.cost)


@pytest.mark.parametrize("seed", range(12))
async def test_recorder_never_passes_the_bound_on_cost(
    upstream: Upstream, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    texts = {i: "word " * draw.randint(0, 40) for i in range(20)}
    upstream.answer = lambda model, prompt: texts[int(prompt.split()[-1])]
    upstream.template_tokens = draw.randint(0, 1000)
    upstream.delay_s = 0.002
    upstream.failures = draw.randint(0, 1)
    result = draw.random() < 0.5
    upstream.price = 1e-3 if result else None
    bound = draw.uniform(0.0, 12.0)
    out = tmp_path / "out.jsonl"
    for _ in range(3):  # resumed twice: the bound is the file's
        progress = await record(
            upstream, out, tasks(20), max_cost=bound, concurrency=draw.randint(1, 10)
        )
        real = spent_of(read_rows(out)) if not result else upstream.charged
        assert real <= bound + 1e-12
        assert progress.cost <= bound + 1e-12
    if progress.done < progress.total:
        assert "bound on cost" in str(progress.stopped)
        worst = 1e-3 * (1024 + 16 + 20 + len("say 00"))
        # It does not stop while another call would fit for sure, unless templates are long.
        assert upstream.template_tokens > 500 or bound - progress.cost < worst


async def test_recorder_refuses_a_file_of_other_prompts_or_settings(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.answer = numbers
    out = tmp_path / "out.jsonl"
    await record(upstream, out, tasks(2))
    kept = out.read_bytes()
    with pytest.raises(OutcomeError, match="other settings"):
        await record(upstream, out, tasks(2), temperature=0.5)
    with pytest.raises(OutcomeError, match="another prompt"):
        await record(upstream, out, tasks(2, prompt="other"))
    assert out.read_bytes() == kept
    # A changed check makes new scores, so the experts are asked again.
    before = upstream.tries.total()
    await record(upstream, out, tasks(2, check={"kind": "number", "answer": 7}))
    assert upstream.tries.total() == before + 4
    assert all(
        outcome["score"] == 0 for row in read_rows(out) for outcome in row["outcomes"].values()
    )


@pytest.mark.parametrize(
    ("verdicts", "score"),
    [
        (["Verdict: 1", "Verdict: 2"], 1.0),
        (["Better.\n\n**Verdict: 2**", "Verdict: 1"], 0.0),
        (["Verdict: 1", "Verdict: 1"], 0.5),
        (["Verdict: tie", "Verdict: 2"], 0.5),
        (["Verdict: 1", "I can't say"], None),
    ],
)
async def test_recorder_judge_decides_in_both_orders(
    upstream: Upstream, tmp_path: Path, verdicts: list[str], score: float | None
) -> None:
    shown: list[str] = []

    def answer(model: str, prompt: str) -> str:
        if model != "j":
            return "MINE"
        shown.append(prompt)
        return verdicts[len(shown) - 1]

    upstream.answer = answer
    out = tmp_path / "out.jsonl"
    check = {"kind": "judge", "reference": "THEIRS", "rubric": "short"}
    progress = await record(
        upstream, out, tasks(1, check=check), experts=("a",), judge="j", max_cost=100.0
    )
    assert [prompt.index("MINE") < prompt.index("THEIRS") for prompt in shown] == [True, False]
    assert not any("expert a" in prompt or '"a"' in prompt for prompt in shown)
    (row,) = read_rows(out)
    if score is None:
        assert row["errors"]["a"]["code"] == "not_scored"
        assert row["outcomes"] == {}
    else:
        outcome = row["outcomes"]["a"]
        assert outcome["score"] == score
        assert outcome["cost"] + outcome["cost_beside"] == pytest.approx(upstream.charged)
    assert progress.cost == pytest.approx(upstream.charged)


async def test_recorder_unit_tests_and_grades_are_scored(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.answer = lambda model, prompt: (
        "Grade: 7" if model == "j" else "```python\ndef f(x):\n    return x + 1\n```"
    )
    given = tasks(1, check={"kind": "unit_tests", "tests": ["assert f(1) == 2"]})
    given += tasks(1, id="g", check={"kind": "judge", "rubric": "short"})
    out = tmp_path / "out.jsonl"
    from router_models.outcome_recording.sandboxed_unit_tests import probe

    if reason := await probe():
        pytest.skip(f"no sandbox here: {reason}")
    await record(upstream, out, given, experts=("a",), judge="j")
    scores = {row["id"]: row["outcomes"]["a"]["score"] for row in read_rows(out)}
    assert scores == {"t0": 1.0, "g": pytest.approx(2 / 3, abs=1e-6)}


async def test_recorder_all_experts_have_rows_when_it_stops_early(
    upstream: Upstream, tmp_path: Path
) -> None:
    upstream.answer = numbers
    out = tmp_path / "out.jsonl"
    await record(upstream, out, tasks(200), max_cost=3.0, concurrency=4)
    rows = join_rows(read_rows(out)).values()
    counts = {name: sum(name in row["outcomes"] for row in rows) for name in ("a", "b")}
    assert 0 < counts["b"] <= counts["a"] <= counts["b"] + 40
    assert len({row["category"] for row in rows}) == 3


async def test_recorder_cancelled_keeps_what_is_done(upstream: Upstream, tmp_path: Path) -> None:
    upstream.answer, upstream.delay_s = numbers, 0.02
    out = tmp_path / "out.jsonl"
    running = asyncio.create_task(record(upstream, out, tasks(100)))
    await until(lambda: len(upstream.asked) >= 30, "30 requests")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    kept = sum(len(row["outcomes"]) for row in read_rows(out))
    assert 10 < kept < 200
    assert json.dumps(read_rows(out))
