"""`python -m loadtests.swap`: Measures the time to make another expert resident, by each method.

It uses the real engine and the demo's family. The methods are in place from host memory, in place
from disk, as an adapter, and by another engine. For comparison, the same run copies the same bytes
in memory, reads and packs the same file, and starts an engine.

With `--engines command` it measures the swaps of other projects' servers, and streams through them,
beside the same by hand. With `--llama-server PATH --gguf A --gguf B` it does so with two models of
llama.cpp, also beside llama-server's own router.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import Estimate, median, ratio_of_medians
from loadtests.lib.targets_and_report import Report, Table, at_least, at_most
from loadtests.swap import foreign_servers, llama_servers
from loadtests.swap.real_shared_slot_engine import SharedEngine, ask, prepare, settings, weights
from service.config import Config
from service.engine.vllm.engine import VllmEngine, VllmModel

_FAMILY = 4
_INPLACE_MS, _TIMES_FASTER, _OF_PACKING, _GROWTH = 60.0, 300.0, 1.5, 0.02
_EARLY, _LATE = 20, 200
_MERGED = "inplace, from disk, adapter merged"


@dataclass(slots=True)
class Found:
    """Seconds of each method, one entry a time; resident bytes early and late."""

    seconds: dict[str, list[float]]
    resident: tuple[int, int]
    weight_bytes: int


def _weight_bytes(folder: str) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def memcpy_s(size: int, times: int) -> list[float]:
    """Copying that many bytes from memory to memory, one thread."""
    source = np.ones(size // 4, dtype=np.float32)
    target = np.zeros_like(source)
    took = []
    for _ in range(times):
        began_s = time.perf_counter()
        np.copyto(target, source)
        took.append(time.perf_counter() - began_s)
    return took


def pack_s(folder: str, times: int) -> list[float]:
    """See `swap_pack`. Raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "loadtests.swap_pack", folder, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"reading and packing failed: {done.stderr[-1000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


async def _inplace(engine: SharedEngine, names: Sequence[str], times: int, found: Found) -> None:
    for name in names[1:]:
        await engine.load_to_host(name)
        await engine.swap_in(name)  # the first one runs the canary
    resident = []
    for i in range(_LATE):
        name = names[i % len(names)]
        done = await engine.swap_in(name)
        if not done.ok:
            raise RuntimeError(f"{name}: not the weights that were loaded")
        if i < times:
            found.seconds["inplace, from host"].append(done.swap_s)
        if i % 10 == 9:
            await ask(engine, name, 16, 2)
        if i + 1 in (_EARLY, _LATE):
            resident.append((await engine.memory())["resident_bytes"])
    found.resident = (resident[0], resident[1])
    plain, merged, other = names[:3]
    await engine.swap_in(other)
    # Once unmeasured: pages that a virtual machine has never touched are slow.
    for i in range(times + 1):
        for name, method in ((plain, "inplace, from disk"), (merged, _MERGED)):
            # As where it has to go to make room for the next.
            await engine.evict(name, for_next=True)
            began_s = time.perf_counter()
            await engine.load_to_host(name)
            filled_s = time.perf_counter() - began_s
            took_s = filled_s + (await engine.swap_in(name)).swap_s
            if i:
                found.seconds[method].append(took_s)
            await engine.swap_in(other)


async def measure(config: Config, times: int, respawns: int) -> Found:
    """All methods, one engine at a time. Raises RuntimeError or CoeError."""
    sources = weights(config)
    names = list(sources)[:_FAMILY]
    options = config.pools["cpu"].vllm
    folder = sources[names[0]].folder
    size = _weight_bytes(folder)
    methods = (
        *("inplace, from host", "inplace, from disk", _MERGED),
        *("lora", "respawn", "engine start"),
    )
    found = Found({name: [] for name in methods}, (0, 0), size)
    engine = SharedEngine({name: sources[name] for name in names}, options)
    try:
        say("an engine that swaps in place")
        await engine.start()
        await _inplace(engine, names, times, found)
        found.seconds["copy of the same bytes"] = memcpy_s(size, times)
        say("reading and packing")
        found.seconds["read and pack the file"] = await asyncio.to_thread(pack_s, folder, times)
    finally:
        await engine.close()
    adapters = {
        f"{name}-{i}": str(sources[name].adapter)
        for i in range(times)
        for name in (names[1 + i % (len(names) - 1)],)
    }
    say("an engine with adapters")
    lora = VllmEngine(VllmModel(names[0], folder, adapters), options, on_cpu=True)
    try:
        await lora.start()
        for name in adapters:
            began_s = time.perf_counter()
            await lora.load(name)
            found.seconds["lora"].append(time.perf_counter() - began_s)
    finally:
        await lora.stop()
    plain: VllmEngine | None = None
    try:
        for i in range(respawns + 1):
            say(f"engine {i + 1} of {respawns + 1}")
            began_s = time.perf_counter()
            if plain is not None:
                await plain.stop()
            stopped_s = time.perf_counter()
            plain = VllmEngine(VllmModel(names[0], folder, {}), options, on_cpu=True)
            await plain.start()
            found.seconds["engine start"].append(time.perf_counter() - stopped_s)
            if i:
                found.seconds["respawn"].append(time.perf_counter() - began_s)
    finally:
        if plain is not None:
            await plain.stop()
    return found


# The methods that move the bytes of the weights, and little else. A swap from host exchanges
# references, and most of an engine's start is no reading.
_MOVED = ("inplace, from disk", _MERGED, "copy of the same bytes", "read and pack the file")


def report_of(found: Found) -> Report:
    """Table and targets."""
    report = Report("swaps")
    table = Table(
        f"{found.weight_bytes / 1e6:.0f} MB of weights; 95 % intervals of the median",
        ("method", "times", "median s", "min s", "max s", "GB/s read or copied"),
    )
    for name, seconds in found.seconds.items():
        middle = median(seconds)
        rate = found.weight_bytes / middle.value / 1e9
        table.rows.append(
            (
                name,
                str(len(seconds)),
                middle.text(4),
                f"{min(seconds):.4f}",
                f"{max(seconds):.4f}",
                f"{rate:.2f}" if name in _MOVED else "",
            )
        )
        report.facts[name] = {
            **middle.as_json(),
            "min": min(seconds),
            "max": max(seconds),
            "times": len(seconds),
        }
    report.tables.append(table)
    host = found.seconds["inplace, from host"]
    early, late = found.resident
    grown = abs(late - early) / early
    report.facts |= {"resident_bytes": list(found.resident), "weight_bytes": found.weight_bytes}
    report.notes.append(
        f"Resident after {_EARLY} swaps {early / 1e6:.0f} MB, after {_LATE} {late / 1e6:.0f} MB."
    )
    report.reach += [
        at_most("in place from host, ms", _INPLACE_MS, median([1000 * s for s in host])),
        at_least(
            "start of a new engine with the same weights, over a swap from host",
            _TIMES_FASTER,
            ratio_of_medians(found.seconds["engine start"], host),
        ),
        at_most(
            "from disk, times reading and packing",
            _OF_PACKING,
            ratio_of_medians(
                found.seconds["inplace, from disk"], found.seconds["read and pack the file"]
            ),
        ),
        at_most("change of resident memory", _GROWTH, Estimate(grown, grown, grown)),
    ]
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("swap", __doc__)
    words.add_argument(
        "--times", type=int, default=10, help="number of swaps by each method (default 10)"
    )
    words.add_argument(
        "--respawns", type=int, default=3, help="number of engine starts (default 3)"
    )
    words.add_argument(
        "--engines",
        choices=("vllm", "command"),
        default="vllm",
        help="the pool's own engine, or servers that commands start (default vllm)",
    )
    words.add_argument(
        "--llama-server",
        type=Path,
        metavar="PATH",
        help="with --engines command: a llama-server instead of the small program",
    )
    words.add_argument(
        "--gguf",
        type=Path,
        action="append",
        metavar="FILE",
        help="its two models: give this twice",
    )
    given = words.parse_args()
    if (given.llama_server is None) != (given.gguf is None):
        words.error("--llama-server and --gguf go together")
    if given.llama_server is not None:
        if given.engines != "command":
            words.error("--llama-server is for --engines command")
        return tell(
            lambda _: llama_servers.report_of(given.llama_server, given.gguf, given.times),
            as_json=given.json,
        )
    if given.engines == "command":
        return tell(lambda _: foreign_servers.report_of(given.times), as_json=given.json)
    prepare()
    return tell(
        lambda _: report_of(asyncio.run(measure(settings(), given.times, given.respawns))),
        as_json=given.json,
    )


if __name__ == "__main__":
    sys.exit(main())
