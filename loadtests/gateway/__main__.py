"""`python -m loadtests.gateway`: Measures the overhead of this gateway.

Without options, it compares this service with vLLM's own API server on a real model. With `--engine
simulated`, it measures the service around an engine that takes no time.
"""

from __future__ import annotations

import argparse
import sys

import uvloop

from loadtests.gateway import gateway_overhead, vs_vllm
from loadtests.lib.command_line import parser, tell
from loadtests.lib.machine_load import Watch
from loadtests.lib.targets_and_report import Report


def _arguments() -> argparse.Namespace:
    words = parser("gateway", __doc__)
    words.add_argument("--engine", choices=("vllm", "simulated"), default="vllm")
    words.add_argument(
        "--quick", action="store_true", help="run fewer pairs; the intervals are wider"
    )
    words.add_argument(
        "--threads", type=int, default=2, help="OMP threads of each vLLM engine (default 2)"
    )
    words.add_argument(
        "--port", type=int, default=8200, help="first of four consecutive free ports (default 8200)"
    )
    return words.parse_args()


async def _measure(given: argparse.Namespace, watch: Watch) -> Report:
    if given.engine == "simulated":
        return await gateway_overhead.run(given.port, watch, quick=given.quick)
    return await vs_vllm.run(given.port, watch, quick=given.quick, threads=given.threads)


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    given = _arguments()
    return tell(lambda watch: uvloop.run(_measure(given, watch)), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
