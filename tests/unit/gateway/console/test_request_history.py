"""The console's history of completed requests."""

from __future__ import annotations

from dataclasses import replace

from service.gateway.console.request_history import WINDOW_S, CompletedRequest, RequestHistory

ONE = CompletedRequest(
    at_s=1000.0,
    request="r",
    asked="auto",
    category="math",
    confidence=0.9,
    recipe="math",
    expert="math",
    status=200,
    outcome="ok",
    route_ms=0.5,
    queue_ms=2.0,
    swap_ms=1.0,
    first_ms=30.0,
    total_ms=90.0,
)


def test_history_is_bounded_and_since_returns_the_new_ones() -> None:
    recent = RequestHistory(size=3)
    for i in range(5):
        recent.add(replace(ONE, request=str(i)))
    assert recent.count == 5
    assert [item["request"] for item in recent.since(0)] == ["2", "3", "4"]
    assert [item["request"] for item in recent.since(4)] == ["4"]
    assert [item["request"] for item in recent.since(0, most=2)] == ["3", "4"]
    assert recent.since(5) == []


def test_flows_count_the_last_minutes_by_category_recipe_and_expert() -> None:
    recent = RequestHistory()
    recent.add(replace(ONE, at_s=1000 - WINDOW_S - 1))
    recent.add(ONE)
    recent.add(ONE)
    recent.add(replace(ONE, category="code", recipe="vote", expert="code"))
    recent.add(replace(ONE, expert="", recipe="", outcome="over_capacity"))
    assert recent.flows(1000.0) == [
        {"category": "code", "recipe": "vote", "expert": "code", "count": 1},
        {"category": "math", "recipe": "math", "expert": "math", "count": 2},
    ]


def test_totals_cover_the_last_minute() -> None:
    recent = RequestHistory()
    recent.add(replace(ONE, at_s=900.0, first_ms=1.0))
    for first_ms in (10.0, 20.0, 90.0):
        recent.add(replace(ONE, first_ms=first_ms))
    recent.add(replace(ONE, outcome="engine_dead", first_ms=0.0))
    recent.add(replace(ONE, outcome="client_gone", first_ms=0.0))
    assert recent.totals(1000.0) == {"requests": 5, "failed": 1, "first_ms": 20.0}
    assert RequestHistory().totals(0.0) == {"requests": 0, "failed": 0, "first_ms": 0.0}
