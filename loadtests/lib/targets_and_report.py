"""Targets of load tests, and their reports: a table or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from loadtests.lib.median_intervals import Estimate


@dataclass(frozen=True, slots=True)
class TargetCheck:
    """A figure and its target. `name` says whether it is a minimum or a maximum."""

    name: str
    target: float
    value: float
    ok: bool


def at_least(
    name: str, target: float, measured: Estimate, *, interval: bool = False, valid: bool = True
) -> TargetCheck:
    """Met when the value is no less; with `interval`, when its interval reaches the target.

    A figure that is not `valid` meets nothing.
    """
    seen = measured.high if interval else measured.value
    return TargetCheck(
        f"{name}, at least", target, _rounded(measured.value), valid and seen >= target
    )


def at_most(
    name: str, target: float, measured: Estimate, *, interval: bool = False, valid: bool = True
) -> TargetCheck:
    """Met when the value is no more; with `interval`, when its interval reaches the target.

    A figure that is not `valid` meets nothing.
    """
    seen = measured.low if interval else measured.value
    return TargetCheck(
        f"{name}, at most", target, _rounded(measured.value), valid and seen <= target
    )


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass(slots=True)
class Table:
    """Rows of text under a heading."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def text(self) -> str:
        """Return the table as Markdown."""
        lines = [list(self.columns), *[list(row) for row in self.rows]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        drawn = [
            "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        rule = "| " + " | ".join("-" * w for w in widths) + " |"
        return "\n".join([self.title, "", drawn[0], rule, *drawn[1:]])


@dataclass(slots=True)
class Report:
    """The results of one run. `facts` goes into the JSON object beside `reach`."""

    name: str
    reach: list[TargetCheck] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The tables, the notes, and what was reached."""
        goals = Table("Reached", ("what", "target", "value", "met"))
        goals.rows = [
            (item.name, f"{item.target:g}", f"{item.value:g}", "yes" if item.ok else "NO")
            for item in self.reach
        ]
        return "\n\n".join([*(t.text() for t in (*self.tables, goals)), *self.notes])

    def as_json(self) -> dict[str, Any]:
        """The one JSON object."""
        return {
            "name": self.name,
            "reach": [asdict(item) for item in self.reach],
            **self.facts,
            "notes": self.notes,
        }

    def tell(self, *, as_json: bool, out: TextIO | None = None) -> None:
        """Print it: the tables on stdout, or on stderr with only the object on stdout."""
        out = out or sys.stdout
        if as_json:
            print(self.text(), file=sys.stderr)
            print(json.dumps(self.as_json()), file=out)
        else:
            print(self.text(), file=out)
