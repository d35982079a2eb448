"""Measures the cost of gate sampling in one engine, with and without it in turn."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.lib.child_processes import say
from loadtests.lib.machine_load import Watch
from loadtests.lib.median_intervals import median, ratios
from loadtests.lib.targets_and_report import Report, Table, at_least
from loadtests.moe.random_mixtral import engine_options, given_or_random
from loadtests.swap.real_shared_slot_engine import ask
from service.config import MoeCapture
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.telemetry.pool_metrics import PoolMetrics

OF_THROUGHPUT = 0.98
_NAME = "moe"
_IN_FLIGHT = 8
# Tokens of prompts and answers, from and to.
_PROMPT, _ANSWER = (16, 80), (8, 40)
# More of other people's work than this and a difference of 2 % can't be told.
_MOST_OTHERS = 0.1
# The demo's layers, fewer of them: what looking costs is for each layer, as what they cost.
_LAYERS, _EXPERTS, _TOP_K = 12, 4, 2
_TICKS = os.sysconf("SC_CLK_TCK")


class Looked(VllmEngine):
    """An engine whose routers are looked at when it is told so."""

    def __init__(self, folder: Path, every: int) -> None:
        self._look = MoeCapture(every=every)
        self.metrics = PoolMetrics(self._look)
        options = engine_options(_IN_FLIGHT).model_copy(update={"moe_capture": self._look})
        model = VllmModel(_NAME, str(folder), {})
        super().__init__(model, options, on_cpu=True, observer=self.metrics)

    async def look(self, on: bool) -> None:
        """Look from now on, as configured, or not at all."""
        options = self._look
        every = options.every if on else 0
        await self.worker_rpc("coe_capture", _NAME, every, options.stretches, options.tokens)

    async def tell(self) -> None:
        """Have what was seen told, as every 10 s."""
        assert self._routing_stats is not None
        await self._routing_stats.poll()

    def core_s(self) -> float:
        """Processor time that the engine's core has used, in s."""
        ended = Path(f"/proc/{self.vllm.core_pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(ended[11]) + int(ended[12])) / _TICKS


@dataclass(slots=True)
class Turns:
    """Results by turn: tokens per s, and the core's processor time per token in s."""

    tokens_per_s: list[float] = field(default_factory=list)
    core_s: list[float] = field(default_factory=list)


async def _turn(engine: Looked, turns: Turns, *, on: bool, requests: int, seed: int) -> None:
    """Run one turn; a `seed` determines the lengths."""
    chance = random.Random(seed)
    lengths = [
        (chance.randint(*_PROMPT), chance.randint(*_ANSWER)) for _ in range(_IN_FLIGHT * requests)
    ]
    waiting = iter(lengths)

    async def lane() -> None:
        for prompt, answer in waiting:
            await ask(engine, _NAME, prompt, answer)

    await engine.look(on)
    began_s, used_s = time.perf_counter(), engine.core_s()
    await asyncio.gather(*(lane() for _ in range(_IN_FLIGHT)))
    if on:
        await engine.tell()
    tokens = sum(map(sum, lengths))
    turns.tokens_per_s.append(tokens / (time.perf_counter() - began_s))
    turns.core_s.append((engine.core_s() - used_s) / tokens)


async def _measure(
    folder: Path, watch: Watch, *, pairs: int, requests: int, every: int
) -> tuple[Turns, Turns, int]:
    engine = Looked(folder, every)
    looked, alone = Turns(), Turns()
    try:
        say("an engine with a mixture of experts")
        await engine.start()
        await _turn(engine, Turns(), on=True, requests=1, seed=pairs)
        with watch.window():
            for i in range(pairs):
                say(f"pair {i + 1} of {pairs}")
                for on in (True, False) if i % 2 else (False, True):
                    turns = looked if on else alone
                    await _turn(engine, turns, on=on, requests=requests, seed=i)
        stats = await engine.metrics.routing_stats(_NAME)
    finally:
        await engine.stop()
    return looked, alone, int(stats["tokens"])


def report(model: Path | None, watch: Watch, *, pairs: int, requests: int, every: int) -> Report:
    """Table and target. `model`: a folder; None: a random one with layers of the demo's size.

    `requests`: of each place in a turn.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = given_or_random(
            model, Path(scratch), layers=_LAYERS, experts=_EXPERTS, top_k=_TOP_K
        )
        measuring = _measure(folder, watch, pairs=pairs, requests=requests, every=every)
        looked, alone, seen = asyncio.run(measuring)
    made = Report("moe_capture")
    table = Table(
        f"One engine, {_IN_FLIGHT} in flight; looked at 1 step of {every}; medians of turns with "
        "95 % intervals",
        ("routers", "turns", "tokens/s, prompts' included", "the core's processor ms per token"),
    )
    for name, turns in (("looked at", looked), ("left alone", alone)):
        core = median([1000 * s for s in turns.core_s])
        rate = median(turns.tokens_per_s)
        table.rows.append((name, str(len(turns.core_s)), rate.text(1), core.text(3)))
        made.facts[name] = {"tokens_per_s": rate.as_json(), "core_ms": core.as_json()}
    made.tables.append(table)
    throughput = ratios(looked.tokens_per_s, alone.tokens_per_s)
    core = ratios(looked.core_s, alone.core_s)
    others = watch.report()["others_share"]
    valid = others <= _MOST_OTHERS
    made.facts |= {
        "of_throughput": throughput.as_json(),
        "times_core_s": core.as_json(),
        "tokens_seen": seen,
        "valid": valid,
    }
    made.notes.append(
        f"Looked at: {throughput.text()} of the throughput of routers left alone, {core.text()} "
        f"times the processor time per token; the routing of {seen} tokens was seen. A turn that "
        "is looked at pays for a telling, which a service does every 10 s."
    )
    if not valid:
        made.notes.append(
            f"NOT A RESULT: other people's work took {others:.0%} of the processor time, and over "
            f"{_MOST_OTHERS:.0%} no 2 % can be told."
        )
    goal = "of the throughput with routers left alone"
    made.reach.append(at_least(goal, OF_THROUGHPUT, throughput, interval=True, valid=valid))
    return made
