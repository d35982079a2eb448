"""`python -m loadtests.swap_gpu`: Compares swaps on a GPU with its bus's bandwidth.

Two random models of 7 B parameters take turns in one real engine. The swap copies their weights
from pinned shared memory into the live parameters. For comparison, the same run measures plain
copies of the same bytes from pinned memory, waking a sleeping engine (vLLM's level 1), and starting
an engine. It needs a GPU with room for one model, and main memory, `/dev/shm` and disk for two.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import Estimate, median, ratio_of_medians
from loadtests.lib.targets_and_report import Report, Table, at_least
from loadtests.swap.real_shared_slot_engine import ask, prepare
from loadtests.swap_gpu.methods import BUS, FILL, INPLACE, MAP, OF_BUS, SLEEP, START, WAKE
from loadtests.swap_gpu.pinned_copies import copy_apart_s
from loadtests.swap_gpu.random_llama import SHAPES, WORDS, Shape, write_random
from service.config import VllmOptions
from service.engine.shared_weight_cache import SharedWeightCache
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights

_OF_BANDWIDTH = 0.8


@dataclass(slots=True)
class Found:
    """Seconds by method, one entry a time.

    Attributes:
        weight_bytes: Bytes of the weights that are swapped.
        seconds: The seconds.
        known: Receives a finding as soon as all times of a method are known.
    """

    weight_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    known: Callable[[dict[str, Any]], None] = field(default=lambda _: None)

    def add(self, method: str, seconds: float) -> None:
        """Add one time."""
        self.seconds.setdefault(method, []).append(seconds)

    def done(self, *methods: str) -> None:
        """Say that all times of these methods are there."""
        for method in methods:
            middle_s = median(self.seconds[method]).value
            self.known(
                {
                    "what": method,
                    "median_s": middle_s,
                    "times": len(self.seconds[method]),
                    "gb_s": self.weight_bytes / middle_s / 1e9,
                }
            )


def check_gpu() -> None:
    """Raise RuntimeError if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU here (torch.cuda.is_available() is False): nothing was measured")


async def _inplace(folders: dict[str, str], options: VllmOptions, times: int, found: Found) -> None:
    sources = {name: Weights(folder) for name, folder in folders.items()}
    first, other = sources
    cache = SharedWeightCache(None)

    def make() -> SwappingVllmEngine:
        return SwappingVllmEngine(
            first, sources, options, on_cpu=False, canary_interval=10**6, canaries={}, cache=cache
        )

    engine = make()
    try:
        say("an engine that swaps in place")
        began_s = time.perf_counter()
        await engine.start()
        found.add(START, time.perf_counter() - began_s)
        found.add(FILL, (await engine.load_to_host(other)).fill_s)
        found.done(START, FILL)
        for name in (other, first):  # the first time runs the canary
            await engine.swap_in(name)
        for i in range(times):
            done = await engine.swap_in((other, first)[i % 2])
            if not done.ok:
                raise RuntimeError("not the weights that were loaded")
            found.add(INPLACE, done.swap_s)
            if i % 4 == 3:
                await ask(engine, (other, first)[i % 2], 16, 2, WORDS)
        found.done(INPLACE)
        found.known({"what": OF_BUS, "value": _part_of_bus(found).value})
        await engine.stop()
        say("another engine of the same pool")
        engine = make()
        await engine.start()
        found.add(MAP, (await engine.load_to_host(other)).fill_s)
        found.done(MAP)
    finally:
        await engine.stop()
        cache.close()


async def _sleeping(folder: str, options: VllmOptions, times: int, found: Found) -> None:
    say("an engine that sleeps")
    engine = VllmEngine(VllmModel("one", folder, {}), options, on_cpu=False, sleep_level=1)
    try:
        await engine.start()
        for i in range(times + 1):
            began_s = time.perf_counter()
            await engine.sleep()
            slept_s = time.perf_counter()
            await engine.wake()
            if i:  # the first time allocates the memory that it sleeps in
                found.add(SLEEP, slept_s - began_s)
                found.add(WAKE, time.perf_counter() - slept_s)
        found.done(SLEEP, WAKE)
        await ask(engine, "one", 16, 2, WORDS)
    finally:
        await engine.stop()


async def measure(
    shape: Shape,
    folder: Path,
    times: int,
    *,
    eager: bool,
    known: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Found:
    """Everything, one engine at a time. Raises RuntimeError, OSError or CoeError."""
    check_gpu()
    found = Found(shape.weight_bytes, known=known)
    folders = {}
    for seed, name in enumerate(("one", "two")):
        say(f"model {name}: {shape.weight_bytes / 1e9:.1f} GB of random weights")
        made = await asyncio.to_thread(write_random, folder / name, shape, seed)
        folders[name] = str(made)
    options = VllmOptions(
        dtype="bfloat16",
        max_model_len=2048,
        kv_cache_bytes=2 * 1024**3,
        max_num_seqs=8,
        enforce_eager=eager,
    )
    say("what the bus can do")
    found.seconds[BUS] = await asyncio.to_thread(copy_apart_s, found.weight_bytes, times)
    found.done(BUS)
    await _inplace(folders, options, times, found)
    await _sleeping(folders["one"], options, times, found)
    return found


def _part_of_bus(found: Found) -> Estimate:
    return ratio_of_medians(found.seconds[BUS], found.seconds[INPLACE])


def report_of(found: Found) -> Report:
    """Table and target."""
    report = Report("swaps on a GPU")
    bus = found.seconds[BUS]
    table = Table(
        f"{found.weight_bytes / 1e9:.2f} GB of weights; 95 % intervals of the median",
        ("method", "times", "median s", "GB/s", "of the bus"),
    )
    for name, seconds in found.seconds.items():
        middle = median(seconds)
        share = ratio_of_medians(bus, seconds)
        table.rows.append(
            (
                name,
                str(len(seconds)),
                middle.text(4),
                f"{found.weight_bytes / middle.value / 1e9:.2f}",
                f"{share.value:.3f}",
            )
        )
        report.facts[name] = {**middle.as_json(), "times": len(seconds)}
    report.tables.append(table)
    faster = ratio_of_medians(found.seconds[WAKE], found.seconds[INPLACE])
    report.facts["times as fast as waking"] = faster.as_json()
    report.notes.append(
        f"In place is {faster.text(2)} times as fast as waking an engine that sleeps at level 1."
    )
    report.reach.append(
        at_least(
            OF_BUS,
            _OF_BANDWIDTH,
            _part_of_bus(found),
        )
    )
    return report


def main() -> int:
    """Return 0 after a measurement, or 1 if it was impossible, for example without a GPU."""
    words = parser("swap_gpu", __doc__)
    words.add_argument(
        "--times", type=int, default=10, help="number of swaps by each method (default 10)"
    )
    words.add_argument(
        "--shape", choices=sorted(SHAPES), default="7b", help="size of the models (default 7b)"
    )
    words.add_argument(
        "--folder", type=Path, help="folder for the models (default: a temporary one)"
    )
    words.add_argument(
        "--eager", action="store_true", help="run without compilation and CUDA graphs"
    )
    words.add_argument(
        "--lines", action="store_true", help="a line of JSON for each finding, once it is known"
    )
    given = words.parse_args()
    prepare()

    def known(finding: dict[str, Any]) -> None:
        if given.lines:
            print(json.dumps(finding), flush=True)

    def run(_: object) -> Report:
        check_gpu()
        with tempfile.TemporaryDirectory(prefix="coe-swap-gpu-", dir=given.folder) as folder:
            shape = SHAPES[given.shape]
            found = asyncio.run(
                measure(shape, Path(folder), given.times, eager=given.eager, known=known)
            )
        return report_of(found)

    return tell(run, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
