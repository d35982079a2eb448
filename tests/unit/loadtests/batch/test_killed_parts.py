"""What the load test of killed parts reports: each thing that may go wrong fails one check."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from loadtests.batch import killed_parts
from loadtests.batch.killed_parts import CANCELLED, KEPT, Cancellation, Kill
from loadtests.lib.targets_and_report import Report

COST = 0.25


def line(number: int) -> dict[str, Any]:
    """A line of an output file."""
    body = {"usage": {"coe": {"cost": COST}}}
    return {"custom_id": f"c{number}", "response": {"body": body}}


class Run:
    """What a run without a fault has found; cases change it."""

    def __init__(self) -> None:
        self.outputs = [[line(i) for i in range(killed_parts._LINES)] for _ in range(2)]
        self.errors = 0
        self.ended = Counter({"completed": 2})
        cost = COST * 2 * killed_parts._LINES
        self.spent = {KEPT: (cost, 0.0), CANCELLED: (1.5, 0.0)}
        self.site = SimpleNamespace(
            kills=[Kill("pool", 0.5), Kill("service", 1.0)],
            cancellations=[Cancellation(0.5, 4, 4, 4, 1.0)],
            resumed=[(5, 6)],
        )

    def failed(self) -> list[str]:
        """The names of the checks that are not met."""
        report = Report("batch, kills")
        killed_parts._tell(
            report,
            self.site,  # type: ignore[arg-type]
            self.outputs,
            self.errors,
            self.ended,
            self.spent,
        )
        return [item.name for item in report.reach if not item.ok]


def lose(run: Run) -> None:
    del run.outputs[1][7]
    run.spent[KEPT] = (run.spent[KEPT][0] - COST, 0.0)


def double(run: Run) -> None:
    run.outputs[0].append(line(3))
    run.spent[KEPT] = (run.spent[KEPT][0] + COST, 0.0)


def swap(run: Run) -> None:
    lines = run.outputs[0]
    lines[0], lines[1] = lines[1], lines[0]


def charge_twice(run: Run) -> None:
    run.spent[KEPT] = (run.spent[KEPT][0] + COST, 0.0)


def charge_nothing(run: Run) -> None:
    run.spent[KEPT] = (run.spent[KEPT][0] - COST, 0.0)


def reserve(run: Run) -> None:
    run.spent[CANCELLED] = (1.5, 0.1)


def fail_a_line(run: Run) -> None:
    run.errors = 1


def never_end(run: Run) -> None:
    run.ended = Counter({"completed": 1, "expired": 1})


def cancel(**fields: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        given = {"took_s": 0.5, "counted": 4, "written": 4, "distinct": 4, "cost": 1.0, **fields}
        run.site.cancellations = [Cancellation(**given)]

    return change


def lose_results(run: Run) -> None:
    run.site.resumed = [(6, 5)]


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (lambda run: None, set()),
        (lose, {"lines lost", "outputs in another order"}),
        (double, {"lines twice", "outputs in another order"}),
        (swap, {"outputs in another order"}),
        (charge_twice, {"units of cost charged beyond"}),
        (charge_nothing, {"units of cost charged beyond"}),
        (reserve, {"units of cost still reserved"}),
        (fail_a_line, {"lines that failed"}),
        (never_end, {"batches completed"}),
        (cancel(took_s=5.1), {"s until a cancelled batch"}),
        (cancel(counted=5), {"cancelled batches whose output"}),
        (cancel(distinct=3), {"cancelled batches whose output"}),
        (cancel(cost=9.0), {"units of cost charged for cancelled"}),
        (lose_results, {"restarts that lost results"}),
    ],
)
def test_each_fault_fails_its_checks_alone(fault: Callable[[Run], None], checks: set[str]) -> None:
    run = Run()
    fault(run)
    failed = run.failed()
    assert len(failed) == len(checks)
    assert {check for check in checks for name in failed if name.startswith(check)} == checks


def test_order_kills_every_part_and_the_whole_service_once() -> None:
    parts = Counter(killed_parts._order(20, random.Random(1)))
    assert parts == {"gateway": 5, "pool": 5, "engine": 5, "Redis": 4, "service": 1}
