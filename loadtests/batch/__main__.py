"""`python -m loadtests.batch`: Measures whole batches.

Parts: `quality` (budgets on recorded outcomes), `people` (16 experts on a simulated engine, 20,000
lines, people beside them), `swaps` (the real engine of deploy/config/swap.yaml, six experts),
`kills` (gateways, pools, engines and Redis of a service are killed) and `plan` (time and memory of
planning 20,000 lines).
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from loadtests.batch import beside_people, budgeted_quality, killed_parts, planning_cost
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("batch", __doc__)
    parts = ("quality", "people", "swaps", "kills", "plan")
    words.add_argument("--part", choices=parts, required=True)
    words.add_argument("--quick", action="store_true", help="a smaller batch")
    words.add_argument("--kills", type=int, default=20, help="kills: how many (default 20)")
    words.add_argument("--seed", type=int, default=1, help="kills: of their order and moments")
    words.add_argument("--port", type=int, default=8260, help="kills, plan: first of 3 free ports")
    words.add_argument("--outcomes", type=Path, nargs="+", help="quality: recorded outcomes")
    words.add_argument("--costs", type=Path, help="quality: {expert: price of a token}")
    words.add_argument("--experts", type=lambda text: text.split(","), help="quality: only these")
    given = words.parse_args()
    if given.part == "quality" and (not given.outcomes or given.costs is None):
        words.error("--part quality needs --outcomes and --costs")

    def measure(_: object) -> Report:
        report = Report(f"batch, {given.part}")
        if given.part == "quality":
            budgeted_quality.measure(report, given.outcomes, given.costs, given.experts)
        elif given.part == "people":
            beside_people.measure(report, lines=4_000 if given.quick else 20_000)
        elif given.part == "kills":
            kills = 6 if given.quick else given.kills
            killed_parts.measure(report, given.port, kills=kills, seed=given.seed)
        elif given.part == "plan":
            planning_cost.measure(report, given.port, lines=2_000 if given.quick else 20_000)
        else:
            # vLLM is imported with the engine.
            from loadtests.batch import swaps_real_engine

            asyncio.run(swaps_real_engine.measure(report, lines=150 if given.quick else 600))
        return report

    return tell(measure, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
