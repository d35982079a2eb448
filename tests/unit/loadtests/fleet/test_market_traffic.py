"""The traffic of a model market has the published skew, and what is asked for besides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from loadtests.fleet.market_traffic import (
    Pattern,
    arrivals,
    mean_rates,
    shares,
    viral_expert,
)

PATTERN = Pattern(experts=150, per_s=20.0, for_s=200.0, auto=0.2)


@pytest.mark.parametrize("experts", [150, 600, 1500])
def test_shares_have_the_published_skew(experts: int) -> None:
    found = shares(experts, skewed=True)
    rare = round(0.941 * experts)
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found) <= 1e-12).all()
    assert found[-rare:].sum() == pytest.approx(0.0135, abs=3e-3)


@pytest.mark.parametrize("experts", [1, 2, 10])
@pytest.mark.parametrize("skewed", [True, False])
def test_shares_of_few_experts_add_up(experts: int, skewed: bool) -> None:
    assert shares(experts, skewed=skewed).sum() == pytest.approx(1)


def test_arrivals_are_in_order_repeatable_and_as_many_as_asked_for() -> None:
    found = arrivals(PATTERN, 3)
    times = [one.at_s for one in found]
    assert found == arrivals(PATTERN, 3)
    assert found != arrivals(PATTERN, 4)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < PATTERN.for_s
    assert len(found) == pytest.approx(PATTERN.per_s * PATTERN.for_s, rel=0.1)
    automatic = sum(one.expert is None for one in found) / len(found)
    assert automatic == pytest.approx(PATTERN.auto, abs=0.05)
    assert all(one.prompt_tokens >= 1 and one.answer_tokens >= 1 for one in found)


def test_arrivals_follow_the_mean_rates() -> None:
    rates = mean_rates(PATTERN, 3)
    named = Counter(one.expert for one in arrivals(replace(PATTERN, auto=0.0), 3))
    for expert in np.argsort(-rates)[:3]:
        assert named[int(expert)] == pytest.approx(rates[expert] * PATTERN.for_s, rel=0.25)


def test_daily_pattern_has_a_high_and_a_low() -> None:
    found = arrivals(replace(PATTERN, daily=0.8, day_s=200.0), 1)
    early = sum(one.at_s < 100 for one in found)
    assert early > 2 * (len(found) - early)


def test_bursts_add_requests() -> None:
    calm = arrivals(PATTERN, 5)
    bursting = arrivals(replace(PATTERN, bursts_per_s=0.1, burst_times=20.0), 5)
    assert len(bursting) > 1.2 * len(calm)


def test_viral_expert_is_asked_for_from_its_time_on() -> None:
    pattern = replace(PATTERN, viral_s=100.0, auto=0.0)
    viral = viral_expert(pattern, 2)
    times = [one.at_s for one in arrivals(pattern, 2) if one.expert == viral]
    assert sum(at_s >= 100 for at_s in times) == pytest.approx(200, rel=0.3)
    assert sum(at_s < 100 for at_s in times) <= 3
