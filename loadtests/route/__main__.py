"""`python -m loadtests.route`: Measures the cost of routing, and the quality that it gains.

It measures the time to classify, the memory of the artifact, and the time to select. With
`--outcomes` and `--costs` it also compares the online choice under a budget with the exact optimum.
With `--share` it shows how traffic shifts in the running service as load grows. With `--stages`
and `--test` it measures accuracy, time, memory and throughput of the stages of the classifier.
With `--auto` it measures whole requests for `auto` with the encoder and without. With `--snapshots`
it measures what the snapshots of many pools cost, and a choice among them. With `--prefix` it
measures how often a turn finds its conversation's prefix cache. With `--sessions` it simulates how
often agents in tool loops change their expert.

It uses one core, the demo's artifact unless another is named, and prompts of the given size from
many different words. Each figure is the median over prompts, each of which is timed alone, as in
the gateway.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what we state

from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import median
from loadtests.lib.targets_and_report import Report, Table, TargetCheck, at_most
from loadtests.route import (
    agent_sessions,
    auto_with_encoder,
    budget_replay,
    classifier_stage_worth,
    prefix_cache_hits,
    selection_latency,
    snapshot_streams,
    traffic_share_by_load,
)
from service.classifier.classifier import Classifier
from service.classifier.conversation_classifier import assess_turns
from service.classifier.expert_map import ExpertMap
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import table_of

DEMO = Path(__file__).parents[2] / "router_models" / "artifacts" / "demo@1"
SIZES = (32, 512, 2_000, 8_000, 32_000)
TARGETS_MS = {512: 0.5, 32_000: 1.0}
_WARM_UP = 30


def prompts(chars: int, count: int, seed: int) -> list[str]:
    """`count` different prompts of `chars` characters each, of words that keep changing."""
    draw = random.Random(f"{seed}/{chars}")
    letters = "eeeeettttaaaooiinnsshhrrddlluucmwfgypbvkjxqz"
    made = []
    for _ in range(count):
        words: list[str] = []
        size = 0
        while size < chars:
            word = "".join(draw.choices(letters, k=draw.randint(1, 9)))
            if draw.random() < 0.1:
                word = f"{draw.randint(0, 999)}{draw.choice(',.;?')}"
            words.append(word)
            size += len(word) + 1
        made.append(" ".join(words)[:chars])
    return made


def measure(artifact: Path, rounds: int) -> Report:
    """Time every size and weigh the artifact. Raises ArtifactError."""
    report = Report("route")
    start = time.perf_counter()
    loaded = load_artifact(artifact)
    classifier = Classifier.from_artifact(loaded, table_of(loaded))
    found = ExpertMap.from_artifact(loaded) if "map" in loaded.manifest else None
    load_s = time.perf_counter() - start
    table = Table("Classification, one core", ("characters", "median ms", "95 % interval"))
    report.tables.append(table)
    for chars in SIZES:
        times: list[float] = []
        for text in prompts(chars, rounds + _WARM_UP, 1):
            begun = time.perf_counter()
            assessment = classifier.assess(text)
            if found is not None:
                found.estimate(assessment)
            times.append(1e3 * (time.perf_counter() - begun))
        measured = median(times[_WARM_UP:])
        table.rows.append(
            (f"{chars:,}", f"{measured.value:.3f}", f"{measured.low:.3f}–{measured.high:.3f}")
        )
        if chars in TARGETS_MS:
            report.reach.append(
                at_most(f"classification of {chars} characters, ms", TARGETS_MS[chars], measured)
            )
        report.facts[f"classify_{chars}_ms"] = measured.value
    turns = prompts(512, 6, 2)
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        assess_turns(classifier, turns)
        times.append(1e3 * (time.perf_counter() - begun))
    whole = median(times)
    table.rows.append(
        ("six turns of 512", f"{whole.value:.3f}", f"{whole.low:.3f}–{whole.high:.3f}")
    )
    memory_mb = (classifier.memory_bytes + (found.memory_bytes if found else 0)) / 1e6
    disk_mb = sum(file.stat().st_size for file in artifact.iterdir()) / 1e6
    report.tables.append(
        Table(
            f"Artifact {loaded.name}",
            ("memory MB", "on disk MB", "loaded and checked in ms"),
            [(f"{memory_mb:.2f}", f"{disk_mb:.2f}", f"{1e3 * load_s:.0f}")],
        )
    )
    report.reach.append(
        TargetCheck(
            "memory of the artifact, MB, at most", 64.0, round(memory_mb, 2), memory_mb <= 64.0
        )
    )
    report.facts |= {"artifact": loaded.name, "memory_mb": memory_mb, "disk_mb": disk_mb}
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("route", __doc__)
    words.add_argument("--artifact", type=Path, default=DEMO, help="folder of a router artifact")
    words.add_argument(
        "--rounds", type=int, default=400, help="number of prompts of each size (default 400)"
    )
    words.add_argument(
        "--outcomes", type=Path, nargs="+", help="file or folder of recorded outcomes to replay"
    )
    words.add_argument("--costs", type=Path, help="JSON file: {expert: cost of one call}")
    words.add_argument("--experts", type=lambda text: text.split(","), help="run only these parts")
    words.add_argument(
        "--budgets", type=lambda text: [float(b) for b in text.split(",")], default=[7.5, 20, 31]
    )
    words.add_argument(
        "--share", action="store_true", help="measure each expert's share of traffic by load"
    )
    words.add_argument(
        "--sessions", action="store_true", help="simulate agents in tool loops, with sessions"
    )
    words.add_argument(
        "--auto", action="store_true", help="whole requests with the encoder and without"
    )
    words.add_argument(
        "--snapshots", action="store_true", help="what the snapshots of many pools cost"
    )
    words.add_argument(
        "--prefix", action="store_true", help="turns that find their prefix, by gateways"
    )
    words.add_argument("--stages", action="store_true", help="what each stage costs and is worth")
    words.add_argument("--encoder", default="all-minilm-l6-v2", help="with --stages: the encoder")
    words.add_argument("--test", type=Path, nargs="+", help="with --stages: labelled prompts")
    words.add_argument(
        "--seconds", type=float, default=5.0, help="with --stages, --auto, --snapshots: each round"
    )
    words.add_argument("--turns", type=int, default=8, help="with --auto: rounds (default 8)")
    words.add_argument("--plot", type=Path, help="with --share: write the figure to this PNG file")
    words.add_argument("--port", type=int, default=8180)
    given = words.parse_args()
    if given.outcomes and given.costs is None:
        words.error("--outcomes needs --costs")
    if given.stages and not given.test:
        words.error("--stages needs --test")
    return tell(lambda _: _measured(given), as_json=given.json)


def _measured(given: argparse.Namespace) -> Report:
    report = Report("route")
    if given.stages:
        classifier_stage_worth.measure(
            report,
            given.artifact,
            given.encoder,
            given.test,
            max(given.rounds, 10),
            given.seconds,
        )
    elif given.share:
        traffic_share_by_load.measure(report, given.port, given.plot)
    elif given.auto:
        auto_with_encoder.measure(report, given.port, given.turns, given.seconds)
    elif given.snapshots:
        snapshot_streams.measure(report, given.seconds)
    elif given.prefix:
        prefix_cache_hits.measure(report, given.port)
    elif given.sessions:
        agent_sessions.measure(report)
    elif given.outcomes:
        budget_replay.measure(report, given.outcomes, given.costs, given.experts, given.budgets)
    else:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        report = measure(given.artifact, max(given.rounds, 10))
        selection_latency.measure(report, max(given.rounds, 10))
    return report


if __name__ == "__main__":
    sys.exit(main())
