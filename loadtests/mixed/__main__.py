"""`python -m loadtests.mixed`: Measures six experts that take turns in one engine.

The experts are those of deploy/config/swap.yaml, with full weights, in the real engine. Requests
arrive by a Poisson process, with experts by Zipf popularity. The same requests are sent three
times: to one expert alone, which shows the engine's limit; to all six with this service's planner;
and to all six first come, first served. Each run begins with only the base in memory.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass

from loadtests.lib.child_processes import say
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import percentile
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.mixed.fcfs_baseline import Fcfs
from loadtests.mixed.traffic_trace import Ask, mean_tokens, trace
from loadtests.swap.real_shared_slot_engine import SharedEngine, ask, prepare, settings, weights
from service.config import Config
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy

KIND = "cpu"
_FEWER_SWITCHES, _TIMES, _OF_ALONE = 0.75, 3.0, 0.7

Lease = Callable[[str, int], AbstractAsyncContextManager[float]]


@dataclass(frozen=True, slots=True)
class TraceResult:
    """The result of serving the trace with one system."""

    tokens_per_s: float
    switches: int
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    wall_s: float


async def _play(
    engine: SharedEngine, asks: Sequence[Ask], lease: Lease
) -> tuple[int, list[float], float]:
    """Send each request at its time: tokens that came, waits, and seconds from first to last."""
    waits: list[float] = []

    async def one(wanted: Ask) -> int:
        await asyncio.sleep(wanted.at_s)
        async with lease(wanted.expert, wanted.tokens) as wait_s:
            waits.append(wait_s)
            return await ask(engine, wanted.expert, wanted.prompt_tokens, wanted.tokens)

    began_s = time.monotonic()
    tokens = await asyncio.gather(*(one(wanted) for wanted in asks))
    return sum(tokens), waits, time.monotonic() - began_s


def _outcome(measured: tuple[int, list[float], float], switches: int) -> TraceResult:
    tokens, waits, wall_s = measured
    return TraceResult(
        tokens / wall_s, switches, percentile(waits, 50), percentile(waits, 99), max(waits), wall_s
    )


async def _planned(engine: SharedEngine, config: Config, asks: Sequence[Ask]) -> TraceResult:
    """Through a slot of the pool, as `coe serve` makes it of this config."""
    pool = config.pools[KIND]
    swap = pool.swap
    slot = SharedSlot(
        tuple(Unit(name, (name,), config.experts[name].pinned) for name in config.experts),
        lambda _: engine,
        SwapPolicy(
            min_stay_s=swap.min_stay_s,
            max_wait_s=swap.max_wait_s,
            host_bytes=swap.host_bytes,
            prefetch=swap.prefetch,
        ),
        capacity=pool.max_running,
        max_waiting=10**6,
        start_guess_s=40.0,
        guess=UnitState(host_bytes=1024**3, fill_s=5.0, swap_s=0.05),
        changed=lambda: None,
    )

    @asynccontextmanager
    async def lease(expert: str, tokens: int) -> AsyncIterator[float]:
        async with slot.lease(expert, tokens) as held:
            yield held.queue_s

    supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
    try:
        measured = await _play(engine, asks, lease)
    finally:
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor
    return _outcome(measured, sum(slot.swap_counts().values()))


async def _first_come(engine: SharedEngine, config: Config, asks: Sequence[Ask]) -> TraceResult:
    """Serve first come, first served: the baseline, and a single expert without switches."""
    queue = Fcfs(
        engine, next(iter(config.experts)), capacity=config.pools[KIND].max_running, most_held=None
    )

    @asynccontextmanager
    async def lease(expert: str, _: int) -> AsyncIterator[float]:
        async with queue.lease(expert) as wait_s:
            yield wait_s

    server = asyncio.create_task(queue.run())
    try:
        measured = await _play(engine, asks, lease)
    finally:
        server.cancel()
        with suppress(asyncio.CancelledError):
            await server
    return _outcome(measured, queue.switches)


async def _can_do(engine: SharedEngine, expert: str, capacity: int) -> float:
    """Tokens per second with every place taken."""
    await ask(engine, expert, 16, 4)
    began_s = time.monotonic()
    tokens = await asyncio.gather(*(ask(engine, expert, 40, 40) for _ in range(capacity)))
    return sum(tokens) / (time.monotonic() - began_s)


async def run(share: float, for_s: float) -> Report:
    """Measure. Raises RuntimeError or CoeError where the engine can't be asked."""
    config = settings()
    names = list(config.experts)
    engine = SharedEngine(weights(config), config.pools[KIND].vllm)
    try:
        say("starting the engine")
        await engine.start()
        can_s = await _can_do(engine, names[0], config.pools[KIND].max_running)
        per_s = share * can_s / mean_tokens()
        asks = trace(names, per_s=per_s, for_s=for_s, seed=1)
        say(f"{can_s:.0f} tokens/s with every place taken; {len(asks)} requests, {per_s:.2f}/s")
        alone = [Ask(a.at_s, names[0], a.prompt_tokens, a.tokens) for a in asks]
        say("one expert alone")
        single = await _first_come(engine, config, alone)
        say("six experts, our planner")
        await engine.only(names[0], names)
        ours = await _planned(engine, config, asks)
        say("six experts, first come, first served")
        await engine.only(names[0], names)
        fcfs = await _first_come(engine, config, asks)
    finally:
        await engine.close()
    return _report(single, ours, fcfs, len(asks), can_s, share, config.pools[KIND].swap.max_wait_s)


def _report(
    single: TraceResult,
    ours: TraceResult,
    fcfs: TraceResult,
    requests: int,
    can_s: float,
    share: float,
    bound_s: float,
) -> Report:
    report = Report("mixed traffic, six experts, one engine")
    fewer = 1 - ours.switches / max(1, fcfs.switches)
    times = ours.tokens_per_s / fcfs.tokens_per_s
    of_alone = ours.tokens_per_s / single.tokens_per_s
    report.reach += [
        TargetCheck(
            "share of switches saved, at least",
            _FEWER_SWITCHES,
            round(fewer, 4),
            fewer >= _FEWER_SWITCHES,
        ),
        TargetCheck(
            "times the throughput of FCFS, at least", _TIMES, round(times, 3), times >= _TIMES
        ),
        TargetCheck(
            "99th percentile of waiting, s, at most",
            bound_s,
            round(ours.wait_p99_s, 2),
            ours.wait_p99_s <= bound_s,
        ),
        TargetCheck(
            "of one expert's throughput, at least",
            _OF_ALONE,
            round(of_alone, 3),
            of_alone >= _OF_ALONE,
        ),
    ]
    table = Table(
        f"{requests} requests at {share:g} of what the engine can do ({can_s:.0f} tokens/s)",
        ("served", "tokens/s", "switches", "wait p50 s", "p99 s", "max s", "seconds"),
    )
    ways = {
        "one expert alone": single,
        "six, our planner": ours,
        "six, first come first served": fcfs,
    }
    for name, way in ways.items():
        figures = (way.wait_p50_s, way.wait_p99_s, way.wait_max_s, way.wall_s)
        table.rows.append(
            (name, f"{way.tokens_per_s:.1f}", str(way.switches), *(f"{x:.2f}" for x in figures))
        )
    report.tables.append(table)
    report.facts |= {
        "requests": requests,
        "full_tokens_per_s": can_s,
        "share": share,
        **{
            key: {
                "tokens_per_s": way.tokens_per_s,
                "switches": way.switches,
                "wait_p50_s": way.wait_p50_s,
                "wait_p99_s": way.wait_p99_s,
                "wall_s": way.wall_s,
            }
            for key, way in (("alone", single), ("ours", ours), ("fcfs", fcfs))
        },
    }
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("mixed", __doc__)
    words.add_argument("--quick", action="store_true", help="use a trace of 15 s instead of 50 s")
    words.add_argument(
        "--share",
        type=float,
        default=0.55,
        help="load as a share of the engine's throughput at full capacity (default 0.55)",
    )
    given = words.parse_args()
    prepare()
    return tell(
        lambda _: asyncio.run(run(given.share, 15.0 if given.quick else 50.0)),
        as_json=given.json,
    )


if __name__ == "__main__":
    sys.exit(main())
