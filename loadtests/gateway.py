"""`python -m loadtests.gateway`: what our gateway costs, and what others' cost.

Without options: ours against vLLM's own API server on a real model. With
`--engine simulated`: the service around an engine that costs nothing. With
`--peer litellm`: ours and LiteLLM's proxy in front of the same upstream.
"""

from __future__ import annotations

import argparse
import sys

import uvloop

from loadtests import against_bare, against_litellm, simulated
from loadtests.machine import Watch, describe
from loadtests.reach import Report


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=("vllm", "simulated"), default="vllm")
    parser.add_argument("--peer", choices=("litellm",), help="another gateway to compare with")
    parser.add_argument("--quick", action="store_true", help="fewer pairs, wider intervals")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--threads", type=int, default=2, help="OMP threads of each vLLM engine (default 2)"
    )
    parser.add_argument(
        "--port", type=int, default=8200, help="first of four free ports in a row (default 8200)"
    )
    return parser.parse_args()


async def _measure(given: argparse.Namespace, watch: Watch) -> Report:
    if given.peer == "litellm":
        return await against_litellm.run(given.port, watch, quick=given.quick)
    if given.engine == "simulated":
        return await simulated.run(given.port, watch, quick=given.quick)
    return await against_bare.run(given.port, watch, quick=given.quick, threads=given.threads)


def main() -> int:
    """0: measured, whatever was reached. 1: could not be measured."""
    given = _arguments()
    watch = Watch.start()
    try:
        report = uvloop.run(_measure(given, watch))
    except (RuntimeError, OSError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 1
    machine = watch.report()
    report.facts["machine"] = machine
    report.notes.append(describe(machine))
    report.tell(as_json=given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
