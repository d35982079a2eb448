"""The comparison with plain vLLM: when it is fair, and how it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.gateway.vllm_server import EngineArguments
from loadtests.gateway.vs_vllm import TurnResult, judge, unfairness
from loadtests.lib import machine_load
from loadtests.lib.coe_service import config
from loadtests.lib.machine_load import Process, Ticks, Watch, describe, ours_of, parse_stat
from loadtests.lib.targets_and_report import Report
from loadtests.lib.varied_prompts import prompts
from service.config import Config


def _turn(rate: float, first_ms: float, others: int = 0) -> TurnResult:
    return TurnResult(rate, [first_ms], Ticks(1000, 500, 500 - others))


def _pairs(
    ratio: float, *, others: tuple[int, int] = (0, 0)
) -> list[tuple[TurnResult, TurnResult]]:
    bare = [_turn(100.0 + i, 50.0, others[0]) for i in range(9)]
    return [(b, _turn(b.tokens_per_s * ratio, 53.0, others[1])) for b in bare]


def _judged(ratio: float, *, others: tuple[int, int] = (0, 0)) -> Report:
    report = Report("gateway")
    judge(report, {n: _pairs(ratio, others=others) for n in (1, 8, 32)}, 1)
    return report


def test_judge_similar_conditions_and_close_rates_meets_the_targets() -> None:
    report = _judged(0.98)
    assert report.facts["fair"] is True
    assert [item.ok for item in report.reach] == [True] * 5
    by_name = {item.name: item.value for item in report.reach}
    assert by_name["ms added to the time to first token, 1 in flight, at most"] == 3.0


def test_judge_similar_conditions_and_low_rate_misses_the_targets() -> None:
    report = _judged(0.9)
    assert [item.ok for item in report.reach if "tokens/s" in item.name] == [False] * 4


@pytest.mark.parametrize(
    ("ratio", "others", "why"),
    [
        (1.0, (300, 300), "other people's work took 30%"),
        (1.0, (0, 50), "0% of the processor time in bare's turns and 5% in ours"),
        (1.7, (0, 0), "which our service can't be the cause of"),
    ],
)
def test_judge_unfair_conditions_give_no_result(
    ratio: float, others: tuple[int, int], why: str
) -> None:
    report = _judged(ratio, others=others)
    assert not any(item.ok for item in report.reach)
    assert any("NOT A RESULT" in note and why in note for note in report.notes)


def test_unfairness_of_similar_conditions_is_empty() -> None:
    assert unfairness({1: _pairs(1.0, others=(10, 20))}, []) == []


def test_ticks_since_gives_shares_of_others_and_idle() -> None:
    spent = Ticks(300, 60, 200).since(Ticks(100, 10, 80))
    assert spent == Ticks(200, 50, 120)
    assert spent.others_share == pytest.approx(0.15)
    assert spent.idle_share == pytest.approx(0.25)
    assert Ticks(0, 0, 0).others_share == 0.0


def test_parse_stat_reads_parent_session_and_ticks() -> None:
    line = "42 (a (b) c) S 1 42 7 0 -1 0 0 0 0 0 11 12 13 14 20 0 1 0 5"
    assert parse_stat(line) == Process(42, 1, 7, 50)


def test_ours_of_includes_descendants_in_other_sessions() -> None:
    ours = [
        Process(10, 1, 10, 0),  # the load test
        Process(11, 10, 11, 0),  # a service that it started, in a session of its own
        Process(13, 12, 12, 0),  # Ray's worker, before its parent in the list
        Process(12, 11, 12, 0),  # Ray, started by that in another
        Process(14, 1, 12, 0),  # whose parent has gone
    ]
    others = [Process(1, 0, 1, 0), Process(20, 1, 20, 0), Process(21, 20, 20, 0)]
    assert ours_of([*ours, *others], 10) == ours


def test_watch_reports_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Ticks(0, 0, 0), Ticks(1000, 100, 300)])
    monkeypatch.setattr(machine_load.Ticks, "now", classmethod(lambda cls: next(seen)))
    report = Watch.start().report()
    assert report["others_share"] == 0.6
    assert "BUSY" in describe(report)


def test_watch_with_windows_counts_only_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([Ticks(0, 0, 0), Ticks(1000, 0, 0), Ticks(1100, 20, 78)])
    monkeypatch.setattr(machine_load.Ticks, "now", classmethod(lambda cls: next(seen)))
    watch = Watch.start()
    with watch.window():
        pass
    assert watch.report()["others_share"] == 0.02
    assert watch.report()["busy_with_others"] is False


def test_prompts_are_reproducible_and_distinct() -> None:
    made = prompts(60, seed=5, characters=300)
    assert made == prompts(60, seed=5, characters=300)
    assert len(set(made)) == 60
    assert min(map(len, made)) >= 300


def test_engine_arguments_are_equal_for_vllm_and_the_pool() -> None:
    arguments = EngineArguments(Path("/models/m"), threads=1)
    pool = Config.model_validate(
        config(8200, {"general": {"model": "/models/m"}}, {"cpu": arguments.pool()})
    ).pools["cpu"]
    line = arguments.command_line("general")

    def given(name: str) -> str:
        return line[line.index(name) + 1]

    assert given("--max-num-seqs") == str(pool.vllm.max_num_seqs)
    assert given("--max-model-len") == str(pool.vllm.max_model_len)
    assert given("--kv-cache-memory-bytes") == str(pool.vllm.kv_cache_bytes)
    assert given("--dtype") == pool.vllm.dtype
    assert "--enforce-eager" in line
    assert pool.vllm.enforce_eager
    assert pool.vllm.threads == 1
