"""Common start and end of the load tests' commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from loadtests.lib.machine_load import Watch, describe
from loadtests.lib.targets_and_report import Report
from service.errors import CoeError


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m loadtests.NAME`, with `--json`."""
    words = argparse.ArgumentParser(
        prog=f"python -m loadtests.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return words


def tell(measure: Callable[[Watch], Report], *, as_json: bool) -> int:
    """Measure, and print what came of it beside what the machine did meanwhile.

    0: measured, whatever was reached. 1: could not be measured, and why is on stderr.
    """
    watch = Watch.start()
    try:
        report = measure(watch)
    except (RuntimeError, ValueError, OSError, CoeError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 1
    machine = watch.report()
    report.facts["machine"] = machine
    report.notes.append(describe(machine))
    report.tell(as_json=as_json)
    return 0
