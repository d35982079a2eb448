"""What came of the requests of each fault, and how long recovery took."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.chaos.judged_traffic import BAD, BROKEN, RESET, RIGHT, TYPED, Tally, Verdict
from loadtests.lib.targets_and_report import Report, Table, TargetCheck

DEADLINE_S = 15.0


@dataclass
class Outcome:
    """The requests of one case, by model, and its times in s of `time.monotonic`.

    Attributes:
        name: The fault.
        tallies: The requests by model.
        fault_s: When the fault began.
        heal_s: When it ended.
        whole_s: When all pools were known again afterwards.
        gateways_s: When both gateways had requests again.
        lacks: What was missing at last; empty for nothing.
    """

    name: str
    tallies: dict[str, Tally] = field(default_factory=dict)
    fault_s: float = 0.0
    heal_s: float = 0.0
    whole_s: float = float("inf")
    lacks: str = ""
    gateways_s: float = float("inf")

    @property
    def is_over(self) -> bool:
        """Whether everything is used again."""
        again_s = [tally.works_again_s(self.heal_s) for tally in self.tallies.values()]
        return max(self.whole_s, self.gateways_s, *again_s) < float("inf")

    def count(self, kind: str) -> int:
        """Return the number of requests of all models that ended so."""
        return sum(tally.kinds[kind] for tally in self.tallies.values())


def longest_gap_s(verdicts: Sequence[Verdict], from_s: float, to_s: float) -> float:
    """Return the longest time in [`from_s`, `to_s`] in which no request was answered right."""
    ends = sorted(
        verdict.ended_s
        for verdict in verdicts
        if verdict.kind == RIGHT and from_s <= verdict.ended_s <= to_s
    )
    marks = [from_s, *ends, to_s]
    return max(after - before for before, after in itertools.pairwise(marks))


def longest_wait_s(verdicts: Sequence[Verdict]) -> float:
    """Return the longest time from a request's beginning to its end, right or not."""
    return max((verdict.ended_s - verdict.began_s for verdict in verdicts), default=0.0)


def tell_outcomes(report: Report, outcomes: Sequence[Outcome], left: Mapping[str, float]) -> None:
    """Add a table of all requests, and what was reached."""
    first = ("fault", "model", RIGHT, TYPED, "broken", "resets", "bad", "longest request, s")
    times = ("none right for, s", "right again after its end, s", "errors")
    table = Table("What came of requests", (*first, *times))
    for outcome in outcomes:
        for model, tally in outcome.tallies.items():
            kinds = tally.kinds
            gap_s = longest_gap_s(
                tally.verdicts, outcome.fault_s, max(outcome.heal_s, outcome.fault_s)
            )
            errors = [f"{count} {code}" for code, count in tally.codes.most_common(4)]
            table.rows.append(
                (
                    outcome.name,
                    model,
                    *(str(kinds[kind]) for kind in (RIGHT, TYPED, BROKEN, RESET)),
                    str(sum(kinds[kind] for kind in BAD)),
                    f"{longest_wait_s(tally.verdicts):.1f}",
                    f"{gap_s:.1f}",
                    f"{tally.works_again_s(outcome.heal_s):.1f}",
                    ", ".join(errors),
                )
            )
            for kind in (*BAD, RESET):
                report.notes += [
                    f"{outcome.name}, {model}: {kind}: {detail}" for detail in tally.details(kind)
                ]
    report.tables.append(table)
    columns = ("fault", "pools known again after its end, s", "both gateways used again, s")
    recovery = Table("Recovery", columns)
    recovery.rows = [
        (o.name, f"{o.whole_s - o.heal_s:.1f}", f"{o.gateways_s - o.heal_s:.1f}") for o in outcomes
    ]
    report.tables.append(recovery)

    def zero(name: str, value: float) -> TargetCheck:
        return TargetCheck(f"{name}, at most", 0.0, value, value == 0)

    for kind in BAD:
        report.reach.append(zero(f"{kind}s", float(sum(o.count(kind) for o in outcomes))))
    longest_s = max(
        longest_wait_s(tally.verdicts) for o in outcomes for tally in o.tallies.values()
    )
    report.reach += [
        TargetCheck(
            "s that any request took, at most",
            DEADLINE_S + 2,
            round(longest_s, 1),
            longest_s <= DEADLINE_S + 2,
        ),
        *(zero(f"{name} afterwards", value) for name, value in left.items()),
    ]
    report.facts["outcomes"] = {
        outcome.name: {
            model: {
                "kinds": dict(tally.kinds),
                "codes": dict(tally.codes),
                "longest_s": round(longest_wait_s(tally.verdicts), 2),
                "right_after_fault_s": round(tally.works_again_s(outcome.fault_s), 2),
                "right_after_end_s": round(tally.works_again_s(outcome.heal_s), 2),
            }
            for model, tally in outcome.tallies.items()
        }
        for outcome in outcomes
    }
