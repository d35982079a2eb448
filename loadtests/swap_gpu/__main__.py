"""`python -m loadtests.swap_gpu`: Compares swaps on a GPU with its bus's bandwidth.

Two random models of 7 B parameters take turns in one real engine. The swap copies their weights
from pinned shared memory into the live parameters. For comparison, the same run measures plain
copies of the same bytes from pinned memory, waking a sleeping engine (vLLM's level 1), and starting
an engine. It needs a GPU with room for one model, and main memory, `/dev/shm` and disk for two.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import median, ratio_of_medians
from loadtests.lib.targets_and_report import Report, Table, at_least
from loadtests.swap.real_shared_slot_engine import ask, prepare
from loadtests.swap_gpu.random_llama import SHAPES, WORDS, Shape, write_random
from service.config import VllmOptions
from service.engine.shared_weight_cache import SharedWeightCache
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights

_OF_BANDWIDTH = 0.8
_CHUNK_BYTES = 1 << 30
BUS = "copy from pinned memory, same bytes"
INPLACE, WAKE = "inplace, from pinned memory", "sleep level 1: wake"
FILL, MAP = "to shared memory, from disk", "to another engine, by mapping"
SLEEP, START = "sleep level 1: sleep", "engine start"


@dataclass(slots=True)
class Found:
    """Seconds by method, one entry a time."""

    weight_bytes: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, method: str, seconds: float) -> None:
        """Add one time."""
        self.seconds.setdefault(method, []).append(seconds)


def check_gpu() -> None:
    """Raise RuntimeError if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("no GPU here (torch.cuda.is_available() is False): nothing was measured")


def copy_s(size: int, times: int, device: str = "cuda") -> list[float]:
    """Seconds to copy that many bytes from pinned memory to a device, a gigabyte at a time."""
    import torch

    on_gpu = device != "cpu"
    chunk = min(size, _CHUNK_BYTES)
    source = torch.ones(chunk, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.zeros(chunk, dtype=torch.uint8, device=device)
    took = []
    for _ in range(times + 1):
        if on_gpu:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        for at in range(0, size, chunk):
            part = min(chunk, size - at)
            target[:part].copy_(source[:part], non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began_s)
    return took[1:]


def _copy_apart(size: int, times: int) -> list[float]:
    """`copy_s` in a process of its own, which leaves nothing on the GPU. Raises RuntimeError."""
    code = (
        "import json; from loadtests.swap_gpu import copy_s; "
        f"print(json.dumps(copy_s({size}, {times})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"copying from pinned memory failed: {done.stderr[-1000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


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
        for name in (other, first):  # the first time runs the canary
            await engine.swap_in(name)
        for i in range(times):
            done = await engine.swap_in((other, first)[i % 2])
            if not done.ok:
                raise RuntimeError("not the weights that were loaded")
            found.add(INPLACE, done.swap_s)
            if i % 4 == 3:
                await ask(engine, (other, first)[i % 2], 16, 2, WORDS)
        await engine.stop()
        say("another engine of the same pool")
        engine = make()
        await engine.start()
        found.add(MAP, (await engine.load_to_host(other)).fill_s)
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
        await ask(engine, "one", 16, 2, WORDS)
    finally:
        await engine.stop()


async def measure(shape: Shape, folder: Path, times: int, *, eager: bool) -> Found:
    """Everything, one engine at a time. Raises RuntimeError, OSError or CoeError."""
    check_gpu()
    found = Found(shape.weight_bytes)
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
    found.seconds[BUS] = await asyncio.to_thread(_copy_apart, found.weight_bytes, times)
    await _inplace(folders, options, times, found)
    await _sleeping(folders["one"], options, times, found)
    return found


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
            "in place, part of the bandwidth from pinned memory",
            _OF_BANDWIDTH,
            ratio_of_medians(bus, found.seconds[INPLACE]),
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
    given = words.parse_args()
    prepare()

    def run(_: object) -> Report:
        check_gpu()
        with tempfile.TemporaryDirectory(prefix="coe-swap-gpu-", dir=given.folder) as folder:
            shape = SHAPES[given.shape]
            found = asyncio.run(measure(shape, Path(folder), given.times, eager=given.eager))
        return report_of(found)

    return tell(run, as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
