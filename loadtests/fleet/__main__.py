"""`python -m loadtests.fleet`: Simulates fleets of 10 to 1,000 accelerators.

The decisions are those of the service: planner, choice among pools, breakers, reports of unmet
demand, snapshots, the pools' queues and their planner of swaps. Engines and time are models, see
`fleet/modelled_engine.py` and `lib/virtual_clock.py`; processor time is real. Traffic has the skew
of a model market, see `fleet/market_traffic.py`.

Objective: the first token within 10 s, and then a token every 0.1 s on average.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from loadtests.fleet.experiments import (
    QUICK,
    Curves,
    Extent,
    by_event,
    by_gateways,
    by_load,
    by_models,
    by_size,
)
from loadtests.fleet.plots import draw
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report

PARTS = ("load", "models", "size", "events", "gateways")


def measure(parts: list[str], extent: Extent, plot: Path | None) -> Report:
    """Play the parts."""
    report, curves = Report("fleet"), Curves()
    # Pools log each death and each refusal; thousands of them are the point here.
    logging.disable(logging.CRITICAL)
    try:
        _play(report, parts, extent, curves)
    finally:
        logging.disable(logging.NOTSET)
    if plot is not None:
        report.notes += draw(curves, plot)
    return report


def _play(report: Report, parts: list[str], extent: Extent, curves: Curves) -> None:
    if "load" in parts:
        by_load(report, extent, curves)
    if "models" in parts:
        by_models(report, extent, curves)
    if "size" in parts:
        by_size(report, extent, curves)
    if "events" in parts:
        by_event(report, extent, curves)
    if "gateways" in parts:
        by_gateways(report, extent)


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("fleet", __doc__)
    words.add_argument("parts", nargs="*", help=f"what to play: {', '.join(PARTS)} (default: all)")
    words.add_argument("--quick", action="store_true", help="a few seconds of small fleets")
    words.add_argument("--plot", type=Path, help="write a plot to this file (.png or .svg)")
    given = words.parse_args()
    if unknown := sorted(set(given.parts) - set(PARTS)):
        words.error(f"no part {unknown[0]!r}; parts: {', '.join(PARTS)}")
    parts = given.parts or list(PARTS)
    extent = QUICK if given.quick else Extent()
    return tell(lambda _: measure(parts, extent, given.plot), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
