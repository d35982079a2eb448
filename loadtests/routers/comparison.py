"""Tables and targets of a comparison, from what was measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.lib import median_intervals
from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, Table, TargetCheck, at_least, at_most
from loadtests.routers.measurements import CHUNKS, COMMON_LEVEL, STEP_MS
from loadtests.routers.searches import MOST_ERRORS, MOST_P99_MS, Load

OURS = "ours"
DIRECT = "direct"
MOST_CHUNK_MS = 5.0
_MOST_OF_RUST = 3.0
_LEAST_OF_RUST = 0.2
_MIB = 1 << 20


@dataclass(slots=True)
class Measured:
    """What was measured of one side.

    Attributes:
        language: What its path of a request is written in.
        rust_router: Whether it only relays.
        alone_ms: Times of replies with one in flight.
        loads: One for each round, at the number in flight that the search found.
        streams: The most streams sustained, one number for each round.
        chunk_ms: The 99th percentile of what it adds to a chunk at the common number of streams,
            one for each round; infinite where they were not whole.
        held_bytes: Its memory after all rounds; None of the upstream.
        idle_share: The share of a core that it takes while nobody asks.
    """

    language: str = ""
    rust_router: bool = False
    alone_ms: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    held_bytes: int | None = None
    idle_share: float = 0.0

    @property
    def within(self) -> bool:
        """Whether times and errors of all rounds together keep the bounds."""
        return (
            bool(self.loads)
            and sum(load.errors for load in self.loads) / len(self.loads) < MOST_ERRORS
            and max(load.p99_ms for load in self.loads) < MOST_P99_MS
        )

    @property
    def rates(self) -> list[float]:
        """Good replies per second of each round."""
        return [load.replies_per_s for load in self.loads]

    @property
    def busy_ms(self) -> list[float]:
        """Processor time per reply of each round."""
        return [load.busy_ms for load in self.loads]


def fill(report: Report, measured: Mapping[str, Measured]) -> None:
    """Add tables, targets and facts. `measured` has both `ours` and `direct`."""
    report.tables += [_each(measured), _ours_over(measured)]
    report.reach += targets(measured)
    report.facts["sides"] = {name: _facts(side, measured) for name, side in measured.items()}


def _added(side: Measured, measured: Mapping[str, Measured], percent: float) -> Estimate:
    return median_intervals.percentile_added(side.alone_ms, measured[DIRECT].alone_ms, percent)


def _ratio_of_added(peer: Measured, measured: Mapping[str, Measured], percent: float) -> Estimate:
    return median_intervals.ratio_of_added_percentiles(
        measured[OURS].alone_ms, peer.alone_ms, measured[DIRECT].alone_ms, percent
    )


def _each(measured: Mapping[str, Measured]) -> Table:
    table = Table(
        "Each in front of one upstream, on one core; medians with 95 % intervals",
        (
            "who",
            "written in",
            "added, 1 in flight, p50 ms",
            "p99 ms",
            "replies/s, 20 ms upstream",
            "in flight, p99 ms",
            "processor time per reply, ms",
            f"streams of {CHUNKS} chunks {STEP_MS:g} ms apart",
            f"added to a chunk at {COMMON_LEVEL}, p99 ms",
            "memory, MiB",
            "idle, % of a core",
        ),
    )
    for name, side in measured.items():
        peer = name != DIRECT
        p99_ms = max(load.p99_ms for load in side.loads)
        table.rows.append(
            (
                name,
                side.language,
                _added(side, measured, 50).text(2) if peer else "",
                _added(side, measured, 99).text(2) if peer else "",
                _median(side.rates, 0) + ("" if side.within else ", out of bounds"),
                f"{side.loads[0].in_flight}, {p99_ms:.0f}",
                _median(side.busy_ms, 3) if peer else "",
                _range(side.streams) if peer else "",
                _median(side.chunk_ms, 2) if peer else "",
                f"{side.held_bytes / _MIB:.0f}" if side.held_bytes is not None else "",
                f"{100 * side.idle_share:.1f}" if peer else "",
            )
        )
    return table


def _median(values: Sequence[float], digits: int) -> str:
    """The median; its interval where rounds differ; no number where a stream was not whole."""
    if not all(map(math.isfinite, values)):
        return "not sustained"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return median_intervals.median(values).text(digits)


def _range(streams: Sequence[int]) -> str:
    """The median of whole numbers, with the least and the most where they differ."""
    middle = sorted(streams)[(len(streams) - 1) // 2]
    low, high = min(streams), max(streams)
    return str(middle) if low == high else f"{middle} ({low} to {high})"


def _ours_over(measured: Mapping[str, Measured]) -> Table:
    table = Table(
        "Ours over each; ratios of interleaved rounds",
        (
            "over",
            "added time, p50",
            "added time, p99",
            "replies/s",
            "processor time per reply",
            "streams",
            "memory",
        ),
    )
    ours = measured[OURS]
    for name, side in measured.items():
        if name in (OURS, DIRECT):
            continue
        memory = (ours.held_bytes or 0) / (side.held_bytes or 1)
        table.rows.append(
            (
                name,
                _ratio_of_added(side, measured, 50).text(2),
                _ratio_of_added(side, measured, 99).text(2),
                median_intervals.ratios(ours.rates, side.rates).text(2),
                median_intervals.ratios(ours.busy_ms, side.busy_ms).text(2),
                _streams_ratio(ours, side).text(2),
                f"{memory:.1f}",
            )
        )
    return table


def _streams_ratio(ours: Measured, peer: Measured) -> Estimate:
    """Of the numbers of streams; a peer that sustains none counts as one stream."""
    return median_intervals.ratios(ours.streams, [max(1, n) for n in peer.streams])


def targets(measured: Mapping[str, Measured]) -> list[TargetCheck]:
    """Better than the gateways, and not far from the routers that only relay."""
    ours = measured[OURS]
    checks = []
    for name, side in measured.items():
        if name in (OURS, DIRECT):
            continue
        most = _MOST_OF_RUST if side.rust_router else 1.0
        least = _LEAST_OF_RUST if side.rust_router else 1.0
        valid = ours.within
        checks += [
            at_most(f"times {name}'s added time, p50", most, _ratio_of_added(side, measured, 50)),
            at_least(
                f"times {name}'s replies/s",
                least,
                median_intervals.ratios(ours.rates, side.rates),
                valid=valid,
            ),
        ]
        if not side.rust_router:
            checks += [
                at_most(
                    f"times {name}'s added time, p99", most, _ratio_of_added(side, measured, 99)
                ),
                at_least(f"times {name}'s streams", 1.0, _streams_ratio(ours, side)),
            ]
    return checks


def _facts(side: Measured, measured: Mapping[str, Measured]) -> dict[str, object]:
    facts: dict[str, object] = {
        "replies_per_s": median_intervals.median(side.rates).as_json(),
        "in_flight": side.loads[0].in_flight,
        "within_bounds": side.within,
    }
    if side is measured[DIRECT]:
        return facts
    return facts | {
        "added_p50_ms": _added(side, measured, 50).as_json(),
        "added_p99_ms": _added(side, measured, 99).as_json(),
        "busy_ms_per_reply": median_intervals.median(side.busy_ms).as_json(),
        "streams": side.streams,
        "added_to_a_chunk_p99_ms": [ms if math.isfinite(ms) else None for ms in side.chunk_ms],
        "memory_bytes": side.held_bytes,
        "idle_share": side.idle_share,
    }
