"""Every experiment of the fleet can be played, and a small fleet does what it should."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtests.fleet.__main__ import PARTS, measure
from loadtests.fleet.baselines import best_placement
from loadtests.fleet.experiments import (
    QUICK,
    SYSTEMS,
    attainment_over_time,
    market,
    settled_after_s,
)
from loadtests.fleet.market_traffic import Arrival
from loadtests.fleet.modelled_engine import EngineCosts
from loadtests.fleet.simulated_fleet import Answer, Scenario, play

SMALL = Scenario(market(8, 30.0, load=4.0), accelerators=3, held=4, warm_s=5.0)


def answered(at_s: float, first_s: float) -> Answer:
    return Answer(Arrival(at_s, 0, 0, 10, 10), first_s, 0.02, "e0", "", 1)


def test_quick_run_plays_every_part() -> None:
    report = measure(list(PARTS), QUICK, None)
    text = report.text()
    assert len(report.tables) == len(PARTS)
    assert all(system in text for system in SYSTEMS)
    assert all(check.value >= 0 for check in report.reach)


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_system_answers_every_request_and_plays_alike_again(system: str) -> None:
    first, again = (play(SMALL, 2, SYSTEMS[system]) for _ in range(2))
    assert len(first.answers) > 10
    assert [one.fault for one in first.answers if not one.expert] == []
    assert [one.first_s for one in first.answers] == [one.first_s for one in again.answers]
    assert first.switches == again.switches


@pytest.mark.parametrize("event", [{"kill_s": 10.0, "kill_share": 0.34}, {"reload_s": 10.0}])
def test_fleet_loses_no_request_in_an_event(event: dict[str, float]) -> None:
    outcome = play(replace(SMALL, gateways=2, **event), 1)
    assert [one.fault for one in outcome.answers if not one.expert] == []


def test_attainment_over_time_and_the_time_until_it_has_settled() -> None:
    answers = [answered(at_s, 20.0 if 10 <= at_s < 18 else 1.0) for at_s in range(30)]
    assert attainment_over_time(answers, 5.0) == [
        (0.0, 1.0),
        (5.0, 1.0),
        (10.0, 0.0),
        (15.0, 0.4),
        (20.0, 1.0),
        (25.0, 1.0),
    ]
    assert settled_after_s(answers, 10.0, 5.0) == 10.0
    assert settled_after_s(answers, 20.0, 5.0) == 0.0


def test_best_placement_gives_popular_experts_replicas_and_fills_no_memory_beyond_its_bound() -> (
    None
):
    rates = {f"e{i}": 20.0 if i == 0 else 0.01 for i in range(40)}
    placed = best_placement(rates, 6, 8, EngineCosts())
    counts = [sum(at in holders for holders in placed.values()) for at in range(6)]
    assert len(placed["e0"]) >= 3
    assert all(len(set(holders)) == len(holders) >= 1 for holders in placed.values())
    assert max(counts) <= 8
