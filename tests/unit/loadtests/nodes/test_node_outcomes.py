"""What a run with disturbed nodes reports."""

from __future__ import annotations

import pytest

from loadtests.chaos.judged_traffic import LATE, RIGHT, TYPED, Tally, Verdict
from loadtests.lib.targets_and_report import Report
from loadtests.nodes.node_outcomes import Outcome, longest_gap_s, longest_wait_s, tell_outcomes


def verdict(began_s: float, ended_s: float, kind: str = RIGHT, detail: str = "") -> Verdict:
    return Verdict(kind, "there", began_s, ended_s, detail)


@pytest.mark.parametrize(
    ("ends", "gap_s"),
    [
        ((), 10.0),  # nothing right from the fault to its end
        ((4.0,), 6.0),
        ((1.0, 2.0, 8.5), 6.5),
        ((-3.0, 12.0), 10.0),  # outside of the fault
    ],
)
def test_longest_gap_is_the_longest_time_without_a_right_answer(
    ends: tuple[float, ...], gap_s: float
) -> None:
    told = [verdict(end_s - 1, end_s) for end_s in ends]
    told.append(verdict(4.0, 5.0, TYPED, "503 unavailable"))
    assert longest_gap_s(told, 0.0, 10.0) == gap_s


def test_longest_wait_counts_requests_that_failed() -> None:
    assert longest_wait_s([]) == 0.0
    assert longest_wait_s([verdict(0, 1), verdict(2, 9, TYPED)]) == 7.0


def outcome(*verdicts: Verdict) -> Outcome:
    return Outcome("a fault", {"there": Tally(list(verdicts))}, 1.0, 5.0, 7.5)


def missed(report: Report) -> set[str]:
    return {item.name for item in report.reach if not item.ok}


def test_report_of_answered_and_refused_requests_misses_nothing() -> None:
    report = Report("nodes")
    refused = verdict(2, 3, TYPED, "503 unavailable")
    tell_outcomes(report, [outcome(verdict(0, 1), refused, verdict(6, 6.5))], {"in flight": 0.0})
    assert missed(report) == set()
    assert report.facts["outcomes"]["a fault"]["there"]["right_after_end_s"] == 1.5
    (row,) = report.tables[0].rows
    assert "1 503 unavailable" in row


def test_report_tells_late_and_left_requests() -> None:
    report = Report("nodes")
    late = verdict(1, 30, LATE, "right after 29.0 s")
    tell_outcomes(report, [outcome(late)], {"in flight": 2.0})
    assert missed(report) == {
        f"{LATE}s, at most",
        "s that any request took, at most",
        "in flight afterwards, at most",
    }
    assert any("right after 29.0 s" in note for note in report.notes)
