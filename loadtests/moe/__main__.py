"""`python -m loadtests.moe`: Measures capturing, steering and building mixtures of experts.

Part `capture` measures the cost of sampling gates. Part `steer` measures the cost and the savings
of steering. Part `drop` measures what it saves when a profile drops choices of single tokens. Part
`offload` compares policies for experts that do not all fit, by simulation. Part
`build` measures what a mixture of dense experts retains of each, and needs `--data`. `--part` runs
one part alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from loadtests.lib.command_line import parser, tell
from loadtests.lib.machine_load import Watch
from loadtests.lib.targets_and_report import Report
from loadtests.swap.real_shared_slot_engine import prepare
from service.config import MoeCapture

Part = Callable[[], Report]


def joined(parts: dict[str, Part]) -> Report:
    """All parts, one after the other, in one report; each one's facts under its name."""
    whole = Report("moe")
    for name, part in parts.items():
        made = part()
        whole.reach += made.reach
        whole.tables += made.tables
        whole.notes += made.notes
        whole.facts[name] = made.facts
    return whole


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("moe", __doc__)
    names = ("capture", "steer", "drop", "offload", "build")
    words.add_argument(
        "--part", action="append", choices=names, help="run only this part; may be repeated"
    )
    words.add_argument("--model", type=Path, help="folder of a mixture of experts, for every part")
    words.add_argument("--data", type=Path, help="build: folder with recorded texts")
    words.add_argument(
        "--pairs", type=int, default=12, help="capture: number of turns of each kind (default 12)"
    )
    words.add_argument(
        "--requests",
        type=int,
        default=4,
        help="capture: number of requests in a turn for each of 8 places (default 4)",
    )
    words.add_argument(
        "--every",
        type=int,
        default=MoeCapture().every,
        help="capture: sample one step in this many (default: the config's default)",
    )
    words.add_argument(
        "--exchanges",
        type=int,
        default=200,
        help="steer: number of exchanges of profiles (default 200)",
    )
    words.add_argument(
        "--turns",
        type=int,
        default=8,
        help="steer, drop: number of turns of each profile (default 8)",
    )
    given = words.parse_args()
    wanted = given.part or [name for name in names if name != "build" or given.data is not None]
    if "build" in wanted and given.data is None:
        words.error("--part build needs --data")
    prepare()

    def measure(watch: Watch) -> Report:
        # Imported here: one brings vLLM, the other transformers.
        def capture() -> Report:
            from loadtests.moe import capture_overhead as moe_capture

            return moe_capture.report(
                given.model,
                watch,
                pairs=given.pairs,
                requests=given.requests,
                every=given.every,
            )

        def steer() -> Report:
            from loadtests.moe import steering_cost as moe_steer

            return moe_steer.report(given.model, times=given.exchanges, turns=given.turns)

        def drop() -> Report:
            from loadtests.moe import dropped_choices as moe_drop

            return moe_drop.report(given.model, turns=given.turns)

        def offload() -> Report:
            from loadtests.moe import offload_simulated

            return offload_simulated.report(offload_simulated.traces(given.model))

        def build() -> Report:
            from loadtests import moe_build

            return moe_build.report(given.data, given.model)

        known: dict[str, Part] = {
            "capture": capture,
            "steer": steer,
            "drop": drop,
            "offload": offload,
            "build": build,
        }
        return joined({name: known[name] for name in names if name in wanted})

    return tell(measure, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
