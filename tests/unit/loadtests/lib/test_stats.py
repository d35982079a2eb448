"""The figures that load tests report: estimates, and what is held against them."""

from __future__ import annotations

import io
import json

import pytest

from loadtests.lib import stats
from loadtests.lib.stats import Estimate
from loadtests.lib.targets import Report, Table, at_least, at_most


def test_a_median_lies_in_its_interval() -> None:
    found = stats.median([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.value == 3.0
    assert found.low <= found.value <= found.high
    assert found == stats.median([1.0, 2.0, 3.0, 4.0, 100.0])


def test_equal_values_leave_no_doubt() -> None:
    assert stats.median([2.0] * 9) == Estimate(2.0, 2.0, 2.0)


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="at least one"):
        stats.median([])


def test_pairs_are_compared_one_by_one() -> None:
    assert stats.ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Estimate(2.0, 2.0, 2.0)
    assert stats.differences([3.0, 13.0], [1.0, 11.0]) == Estimate(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        stats.ratios([1.0], [1.0, 2.0])


def test_every_group_counts_alike() -> None:
    found = stats.mean_of_medians([[4.0] * 40, [1.0]])
    assert found.value == pytest.approx(2.0)
    assert stats.ratio_of_medians([6.0] * 3, [2.0] * 5) == Estimate(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("value", "high", "interval", "valid", "ok"),
    [
        (0.98, 0.99, False, True, True),
        (0.96, 0.98, False, True, False),
        (0.96, 0.98, True, True, True),
        (0.95, 0.96, True, True, False),
        (0.98, 0.99, True, False, False),
    ],
)
def test_at_least(value: float, high: float, interval: bool, valid: bool, ok: bool) -> None:
    found = at_least("x", 0.97, Estimate(value, 0.9, high), interval=interval, valid=valid)
    assert (found.name, found.target, found.value, found.ok) == ("x, at least", 0.97, value, ok)


@pytest.mark.parametrize(
    ("value", "low", "interval", "ok"),
    [(4.0, 3.0, False, True), (6.0, 4.0, False, False), (6.0, 4.0, True, True)],
)
def test_at_most(value: float, low: float, interval: bool, ok: bool) -> None:
    assert at_most("x", 5.0, Estimate(value, low, 9.0), interval=interval).ok is ok


def test_json_is_one_object_with_reach(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("demo", facts={"rate": 3.0})
    report.tables.append(Table("Rates", ("who", "rate"), [("ours", "3")]))
    report.reach.append(at_least("rate", 2.0, Estimate(3.0, 2.5, 3.5)))
    out = io.StringIO()
    report.tell(as_json=True, out=out)
    told = json.loads(out.getvalue())
    assert told["reach"] == [{"name": "rate, at least", "target": 2.0, "value": 3.0, "ok": True}]
    assert told["rate"] == 3.0
    assert "| ours | 3    |" in capsys.readouterr().err


def test_a_miss_is_shown_as_one() -> None:
    report = Report("demo", [at_least("rate", 2.0, Estimate(1.0, 0.5, 1.5))])
    assert "| NO" in report.text()
