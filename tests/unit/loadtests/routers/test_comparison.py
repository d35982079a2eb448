"""Tables and targets of a comparison."""

from __future__ import annotations

import json
import math

import pytest

from loadtests.lib import median_intervals
from loadtests.lib.targets_and_report import Report
from loadtests.routers.comparison import DIRECT, OURS, Measured, fill, targets
from loadtests.routers.searches import Load

_LATE = 2000.0


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(median_intervals, "_RESAMPLES", 50)
    monkeypatch.setattr(median_intervals, "_PERCENTILE_RESAMPLES", 20)


def _side(added_ms: float, rate: float, streams: int, *, rust: bool = False) -> Measured:
    loads = [Load(64, rate + i, 30.0, 0.0, busy_ms=1000 / rate) for i in range(3)]
    return Measured(
        language="Rust" if rust else "Node",
        rust_router=rust,
        alone_ms=[1.0 + added_ms + i / 1000 for i in range(100)],
        loads=loads,
        streams=[streams],
        chunk_ms=[1.0 if streams >= 64 else math.inf],
        held_bytes=100 << 20,
        idle_share=0.01,
    )


def _measured() -> dict[str, Measured]:
    direct = Measured(
        alone_ms=[1.0 + i / 1000 for i in range(100)], loads=[Load(1024, 40_000.0, 40.0, 0.0)] * 3
    )
    return {
        DIRECT: direct,
        OURS: _side(1.0, 2000.0, 128),
        "relay": _side(0.5, 9000.0, 256, rust=True),
        "other": _side(4.0, 1000.0, 32),
    }


def test_fill_tells_every_gateway_and_its_ratio() -> None:
    report = Report("routers")
    fill(report, _measured())
    each, over = report.tables
    assert [row[0] for row in each.rows] == [DIRECT, OURS, "relay", "other"]
    assert each.rows[1][2].startswith("1.00 (")
    assert each.rows[3][8] == "not sustained"
    assert [row[0] for row in over.rows] == ["relay", "other"]
    assert over.rows[0][1].startswith("2.00 (")
    assert over.rows[1][5].startswith("4.00 (")
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))


def test_targets_ask_more_beside_gateways_than_beside_relays() -> None:
    checks = targets(_measured())
    assert all(check.ok for check in checks)
    found = {check.name: check.target for check in checks}
    assert found["times relay's added time, p50, at most"] == 3.0
    assert found["times relay's replies/s, at least"] == 0.2
    assert found["times other's added time, p50, at most"] == 1.0
    assert found["times other's replies/s, at least"] == 1.0
    assert found["times other's streams, at least"] == 1.0


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        (_side(5.0, 2000.0, 128), "added time"),
        (_side(1.0, 900.0, 128), "replies/s"),
        (_side(1.0, 2000.0, 16), "streams"),
    ],
)
def test_targets_are_missed_where_ours_is_worse(worse: Measured, missed: str) -> None:
    checks = targets(_measured() | {OURS: worse})
    failed = [check.name for check in checks if not check.ok]
    assert failed
    assert all(missed in name for name in failed)


@pytest.mark.parametrize("load", [Load(64, 2000.0, _LATE, 0.0), Load(64, 2000.0, 30.0, 0.01)])
def test_replies_out_of_bounds_meet_no_target(load: Load) -> None:
    measured = _measured()
    measured[OURS].loads = [measured[OURS].loads[0], load, measured[OURS].loads[2]]
    checks = [check for check in targets(measured) if "replies/s" in check.name]
    assert checks
    assert not any(check.ok for check in checks)


def test_streams_over_a_gateway_that_sustains_none_is_a_number() -> None:
    measured = _measured()
    measured["other"].streams = [0]
    streams = next(check for check in targets(measured) if "streams" in check.name)
    assert streams.value == 128
    assert streams.ok
