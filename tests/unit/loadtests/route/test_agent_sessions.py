"""The simulation of agents: the same conversations in both arms, and no unsafe switch."""

from __future__ import annotations

from loadtests.lib.targets_and_report import Report
from loadtests.route.agent_sessions import measure, scripts


def test_scripts_are_the_same_for_a_seed_and_use_every_api_and_way_of_naming() -> None:
    made = scripts(600, seed=3)
    assert made == scripts(600, seed=3)
    assert sum(len(script.steps) for script in made) >= 600
    assert len({script.path for script in made}) == 3
    assert {bool(s.header) + 2 * bool(s.named) for s in made} == {0, 1, 2}


def test_measure_sessions_switch_less_and_never_with_an_open_call() -> None:
    report = Report("route")
    measure(report, turns=400, loads=(40,))
    (found,) = report.facts["sessions"]
    assert found["unsafe"] == 0 < found["unsafe_turn_by_turn"]
    assert found["switches"] < found["switches_turn_by_turn"]
    assert found["gain"]["low"] <= found["gain"]["value"] <= found["gain"]["high"]
