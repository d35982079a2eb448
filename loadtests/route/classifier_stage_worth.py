"""The classifier's stages: what each costs, what each is worth, and what the encoder costs `auto`.

The throughput is that of the gateway's planning in one process: every request is parsed and planned
on one event loop, with many in flight, with the encoder and without. Each category has an expert of
its own, so that every doubt matters. `auto_with_encoder` measures whole requests.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import psutil

from loadtests.lib.median_intervals import Estimate, median
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from router_models.category_fit import cost_curve, judge
from router_models.labelled_prompt_reader import LabelledPrompt, prompt_files, read_prompts
from router_models.stage_fit import encode
from service.classifier.classifier import Classifier
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import table_of
from service.config import Config
from service.encoder.onnx_encoder import OnnxEncoder
from service.encoder.shared_encoders import SharedEncoders
from service.gateway.request.parsing import parse_request
from service.gateway.routing.routing_setup import RoutingSetup
from service.models.encoder_store import require_encoder
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry

_TARGETS_MS = {32: 4.0, 128: 16.0}
_IN_FLIGHT = 32
_PREPARED_S = 60.0


def measure(
    report: Report, artifact: Path, encoder: str, test: Sequence[Path], rounds: int, seconds: float
) -> None:
    """Measure latency, accuracy on the `test` prompts, throughput and memory.

    Raises:
        ArtifactError: The artifact or the encoder can't be used.
        ModelStoreError: The encoder is not there.
    """
    loaded = OnnxEncoder(require_encoder(encoder))
    _latency(report, loaded, rounds)
    rows, _ = read_prompts(prompt_files(test))
    _accuracy(report, artifact, loaded, rows)
    asyncio.run(_throughput(report, artifact, encoder, rows, seconds))


def _latency(report: Report, encoder: OnnxEncoder, rounds: int) -> None:
    table = Table("Encoder, one core, one text", ("tokens", "median ms", "95 % interval"))
    draw = np.random.default_rng(0)
    for tokens, most in _TARGETS_MS.items():
        times = []
        for _ in range(rounds):
            ids = draw.integers(1000, encoder.vocabulary_size, tokens).tolist()
            began = time.perf_counter()
            encoder.encode_ids([ids])
            times.append(1e3 * (time.perf_counter() - began))
        found = median(times[rounds // 10 :])
        table.rows.append((str(tokens), f"{found.value:.2f}", f"{found.low:.2f}–{found.high:.2f}"))
        report.reach.append(at_most(f"encoder, {tokens} tokens, ms", most, found))
    report.tables.append(table)


def _accuracy(
    report: Report, artifact: Path, encoder: OnnxEncoder, rows: Sequence[LabelledPrompt]
) -> None:
    loaded = load_artifact(artifact)
    section = loaded.section("classifier")
    table = Table(
        f"Stages of {loaded.name} on {len(rows)} prompts",
        ("stage", "accuracy %", "calibration error", "median ms a prompt"),
    )
    judged = {}
    stages = {"ngrams": Classifier.from_artifact(loaded)}
    if "static" in section:
        stages["static"] = Classifier.from_artifact(loaded, table_of(loaded))
    vectors = encode(encoder, [row.prompt for row in rows]) if "encoder" in section else None
    for stage, classifier in stages.items():
        times = []
        for row in rows:
            began = time.perf_counter()
            classifier.assess(row.prompt)
            times.append(1e3 * (time.perf_counter() - began))
        found = judged[stage] = judge(classifier, rows, None)
        table.rows.append(_row(stage, found.accuracy, found.ece, median(times).value))
        report.facts[f"{stage}_accuracy"] = found.accuracy
    first = judged[list(stages)[-1]]
    if vectors is not None:
        found = judge(list(stages.values())[-1], rows, vectors)
        times = []
        for row in rows[:200]:
            began = time.perf_counter()
            encoder.encode([row.prompt])
            times.append(1e3 * (time.perf_counter() - began))
        table.rows.append(_row("encoder", found.accuracy, found.ece, median(times).value))
        report.facts["encoder_accuracy"] = found.accuracy
        curve = Table("Accuracy against cost", ("asked below", "asked %", "accuracy %"))
        for point in cost_curve(first, found):
            cells = (point.when_below, 100 * point.asked, 100 * point.accuracy)
            curve.rows.append((f"{cells[0]:.2f}", f"{cells[1]:.1f}", f"{cells[2]:.1f}"))
        report.tables.append(curve)
    report.tables.append(table)


def _row(stage: str, accuracy: float, ece: float, ms: float) -> tuple[str, str, str, str]:
    return stage, f"{100 * accuracy:.1f}", f"{ece:.3f}", f"{ms:.2f}"


async def _throughput(
    report: Report,
    artifact: Path,
    encoder: str,
    rows: Sequence[LabelledPrompt],
    seconds: float,
) -> None:
    """Plans a second with the encoder against without, in turns, as ratios of neighbours."""
    without, _ = await _running(artifact, None)
    with_one, registry = await _running(artifact, encoder)
    texts = [row.prompt for row in rows]
    ratios, rates = [], []
    try:
        for i in range(4):
            plain = await _rate(without, _forever(texts, i), seconds)
            asked = await _rate(with_one, _forever(texts, i), seconds)
            ratios.append(asked / plain)
            rates.append((plain, asked))
        worker_mb = _children_mb()
    finally:
        await with_one.stages.stop()
    ok = registry.value(metric_declarations.ROUTER_ENCODER_REQUESTS, "ok")
    total = sum(
        registry.value(metric_declarations.ROUTER_STAGES, stage)
        for stage in ("ngrams", "static", "encoder", "general")
    )
    late = sum(
        registry.value(metric_declarations.ROUTER_ENCODER_REQUESTS, why)
        for why in ("slow", "busy", "paused")
    )
    report.tables.append(
        Table(
            "Planning with many in flight, one event loop",
            ("plans/s without", "plans/s with the encoder", "reach the encoder %", "too late %"),
            [
                (
                    f"{median([a for a, _ in rates]).value:.0f}",
                    f"{median([b for _, b in rates]).value:.0f}",
                    f"{100 * (ok + late) / max(total, 1):.1f}",
                    f"{100 * late / max(ok + late, 1):.1f}",
                )
            ],
        )
    )
    report.facts |= {"encoder_share": (ok + late) / max(total, 1), "worker_mb": worker_mb}
    ratio: Estimate = median(ratios)
    report.reach.append(at_least("planning with the encoder, of without", 0.9, ratio))
    report.tables.append(
        Table("Memory of the encoder's process", ("resident MB",), [(f"{worker_mb:.0f}",)])
    )


async def _running(artifact: Path, encoder: str | None) -> tuple[RoutingSetup, MetricsRegistry]:
    labels = load_artifact(artifact).manifest["categories"]
    names = [label for label in labels if label != "general"]
    config = Config.model_validate(
        {
            "experts": {name: {"model": "m", "categories": [name]} for name in ("general", *names)},
            "pools": {"cpu": {"engine": "simulated"}},
            "router": {
                "artifact": str(artifact),
                **({"encoder": {"model": encoder}} if encoder is not None else {}),
            },
        }
    )
    registry = MetricsRegistry(Side.GATEWAY)
    setup = RoutingSetup(config, None, None, registry)
    await setup.stages.start(SharedEncoders())
    if encoder is not None and not await setup.stages.wait_prepared(_PREPARED_S):
        raise OSError(f"the encoder {encoder} is not ready, or does not fit the artifact")
    return setup, registry


def _forever(texts: Sequence[str], turn: int) -> Iterator[str]:
    """The prompts again and again; each comes once a round, so that no cache can answer it."""
    for count in itertools.count():
        for text in texts:
            yield f"{text} {turn}-{count}"


async def _rate(setup: RoutingSetup, texts: Iterator[str], seconds: float) -> float:
    done = 0
    end_s = time.monotonic() + seconds

    async def client() -> None:
        nonlocal done
        while time.monotonic() < end_s:
            body = {"model": "auto", "messages": [{"role": "user", "content": next(texts)}]}
            request = parse_request("/v1/chat/completions", orjson.dumps(body), {}, 60_000)
            await setup.planner.plan_by_all_stages(request)
            done += 1
            await asyncio.sleep(0)

    began_s = time.monotonic()
    await asyncio.gather(*(client() for _ in range(_IN_FLIGHT)))
    return done / (time.monotonic() - began_s)


def _children_mb() -> float:
    children = psutil.Process().children()
    return float(sum(child.memory_info().rss for child in children)) / 1e6
