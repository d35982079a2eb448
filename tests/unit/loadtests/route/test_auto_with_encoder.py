"""The prompts and figures of `python -m loadtests.route --auto`."""

from __future__ import annotations

import itertools

import pytest

from loadtests.lib.targets_and_report import Report
from loadtests.route import auto_with_encoder
from loadtests.route.auto_with_encoder import asked_by_reason, demo_mix


def test_demo_mix_has_the_same_prompts_each_time_and_none_twice() -> None:
    texts = list(itertools.islice(demo_mix(1), 5000))
    assert texts == list(itertools.islice(demo_mix(1), 5000))
    assert len(set(texts)) == 5000
    other = list(itertools.islice(demo_mix(2), 5000))
    assert len(set(texts) & set(other)) < 2500


def test_asked_by_reason_adds_gateways() -> None:
    text = "\n".join(
        (
            "# TYPE coe_router_encoder_total counter",
            'coe_router_encoder_total{gateway="a",reason="ok"} 3.0',
            'coe_router_encoder_total{gateway="b",reason="ok"} 4.0',
            'coe_router_encoder_total{reason="needless",gateway="b"} 1.0',
            'coe_router_stage_total{stage="ngrams"} 9.0',
        )
    )
    assert asked_by_reason(text) == {"ok": 7.0, "needless": 1.0}


@pytest.mark.parametrize(("slower", "met"), [(1.05, True), (1.5, False)])
def test_report_holds_ratios_of_pairs_against_the_target(slower: float, met: bool) -> None:
    report = Report("route")
    rates = [[800.0, 400.0, 900.0], [800.0 / slower, 400.0 / slower, 900.0 / slower]]
    costs = [[{"gateway": 1.0}] * 3, [{"gateway": 0.9, "encoder": slower - 0.9}] * 3]
    auto_with_encoder._tell(report, rates, costs, {"ok": 0.1})
    assert [check.ok for check in report.reach] == [met, met]
    assert report.facts["asked"] == {"ok": 0.1}
