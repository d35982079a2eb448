"""The estimates that load tests report, and their comparison with targets."""

from __future__ import annotations

import io
import json

import pytest

from loadtests.lib import median_intervals
from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most


def test_median_lies_in_its_confidence_interval() -> None:
    found = median_intervals.median([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.value == 3.0
    assert found.low <= found.value <= found.high
    assert found == median_intervals.median([1.0, 2.0, 3.0, 4.0, 100.0])


def test_median_of_equal_values_has_a_zero_width_interval() -> None:
    assert median_intervals.median([2.0] * 9) == Estimate(2.0, 2.0, 2.0)


def test_median_of_nothing_raises() -> None:
    with pytest.raises(ValueError, match="at least one"):
        median_intervals.median([])


def test_ratios_and_differences_compare_pairwise() -> None:
    assert median_intervals.ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Estimate(
        2.0, 2.0, 2.0
    )
    assert median_intervals.differences([3.0, 13.0], [1.0, 11.0]) == Estimate(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="zip"):
        median_intervals.ratios([1.0], [1.0, 2.0])


def test_added_percentiles_are_those_of_shifted_samples() -> None:
    baseline = [float(i) for i in range(200)]
    found = median_intervals.percentile_added([x + 5 for x in baseline], baseline, 99)
    assert found.value == pytest.approx(5.0)
    assert found.low <= 5.0 <= found.high
    same = median_intervals.percentile_added([7.0] * 9, [4.0] * 5, 50)
    assert same == Estimate(3.0, 3.0, 3.0)


def test_ratio_of_added_percentiles_takes_the_baseline_from_both() -> None:
    found = median_intervals.ratio_of_added_percentiles([9.0] * 9, [3.0] * 9, [1.0] * 9, 99)
    assert found == Estimate(4.0, 4.0, 4.0)


def test_mean_of_medians_weights_groups_equally() -> None:
    found = median_intervals.mean_of_medians([[4.0] * 40, [1.0]])
    assert found.value == pytest.approx(2.0)
    assert median_intervals.ratio_of_medians([6.0] * 3, [2.0] * 5) == Estimate(3.0, 3.0, 3.0)


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
def test_at_least_compares_value_or_upper_bound(
    value: float, high: float, interval: bool, valid: bool, ok: bool
) -> None:
    found = at_least("x", 0.97, Estimate(value, 0.9, high), interval=interval, valid=valid)
    assert (found.name, found.target, found.value, found.ok) == ("x, at least", 0.97, value, ok)


@pytest.mark.parametrize(
    ("value", "low", "interval", "ok"),
    [(4.0, 3.0, False, True), (6.0, 4.0, False, False), (6.0, 4.0, True, True)],
)
def test_at_most_compares_value_or_lower_bound(
    value: float, low: float, interval: bool, ok: bool
) -> None:
    assert at_most("x", 5.0, Estimate(value, low, 9.0), interval=interval).ok is ok


def test_report_as_json_is_one_object_with_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("demo", facts={"rate": 3.0})
    report.tables.append(Table("Rates", ("who", "rate"), [("ours", "3")]))
    report.reach.append(at_least("rate", 2.0, Estimate(3.0, 2.5, 3.5)))
    out = io.StringIO()
    report.tell(as_json=True, out=out)
    data = json.loads(out.getvalue())
    assert data["reach"] == [{"name": "rate, at least", "target": 2.0, "value": 3.0, "ok": True}]
    assert data["rate"] == 3.0
    assert "| ours | 3    |" in capsys.readouterr().err


def test_report_text_marks_a_missed_target() -> None:
    report = Report("demo", [at_least("rate", 2.0, Estimate(1.0, 0.5, 1.5))])
    assert "| NO" in report.text()
