"""A batch for six experts in the real engine, by plan and first come, first served.

The same lines are served three times: all by one expert, which shows the engine's limit; in the
batch's order through a slot of the pool, paced by its snapshots; and in the order of the file,
first come, first served. Each run begins with only the first expert in memory.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from contextlib import suppress

import numpy as np

from loadtests.lib.child_processes import say
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from loadtests.mixed.fcfs_baseline import Fcfs
from loadtests.mixed.traffic_trace import Ask
from loadtests.swap.real_shared_slot_engine import SharedEngine, ask, prepare, settings, weights
from service.batches.batch_pacing import BatchPacer
from service.batches.batch_planner import run_order
from service.broker.pool_state import PoolView
from service.config import Config
from service.pool.slot_units import Unit, UnitState
from service.pool.slots.shared_slot import SharedSlot
from service.pool.swap_planner import SwapPolicy
from service.rpc.snapshot import Snapshot
from service.types import BATCH, Tenant

KIND = "cpu"
_OF_ALONE, _TIMES = 0.9, 4.0
_TENANT = Tenant("batch", priority=BATCH)
# Seconds of the engine for a token and to load an expert: only their order matters here.
_TOKEN_S, _LOAD_S = 0.01, 1.0


def lines_of(experts: list[str], count: int) -> list[Ask]:
    """The lines, in the order of the file: experts in turn by chance."""
    chance = random.Random(1)
    return [
        Ask(0.0, chance.choice(experts), chance.randint(16, 64), chance.randint(8, 32))
        for _ in range(count)
    ]


def planned(lines: list[Ask], experts: list[str]) -> list[Ask]:
    """The lines in the order of a plan."""
    first = np.array([experts.index(line.expert) for line in lines])
    load_s = np.full((1, len(experts)), _LOAD_S)
    load_s[0, 0] = 0.0
    prompts = [str(line.prompt_tokens) for line in lines]
    work_s = np.array([line.tokens * _TOKEN_S for line in lines])
    order = run_order(first, work_s, prompts, load_s, np.arange(len(experts)))
    return [lines[i] for i in order.tolist()]


async def by_plan(engine: SharedEngine, config: Config, lines: list[Ask]) -> tuple[float, int]:
    """Serve lines in this order through a slot: tokens per second, and swaps."""
    pool = config.pools[KIND]
    slot = SharedSlot(
        tuple(Unit(name, (name,), config.experts[name].pinned) for name in config.experts),
        lambda _: engine,
        SwapPolicy(
            min_stay_s=pool.swap.min_stay_s,
            max_wait_s=pool.swap.max_wait_s,
            host_bytes=pool.swap.host_bytes,
            prefetch=pool.swap.prefetch,
        ),
        capacity=pool.max_running,
        max_waiting=10**6,
        start_guess_s=40.0,
        guess=UnitState(host_bytes=1024**3, fill_s=5.0, swap_s=0.05),
        changed=lambda: None,
    )

    def views() -> list[PoolView]:
        capacity = dict.fromkeys(slot.experts, slot.capacity)
        snapshot = Snapshot(
            "b", KIND, experts=slot.states(), queues=slot.queues(), capacity=capacity
        )
        return [PoolView("b", snapshot, 0.0, {})]

    pacer = BatchPacer(views, dict, 10**6)
    left: dict[str, deque[Ask]] = {}
    for line in lines:
        left.setdefault(line.expert, deque()).append(line)
    came: list[int] = []

    async def one(line: Ask) -> None:
        try:
            async with slot.lease(line.expert, line.prompt_tokens, _TENANT):
                came.append(await ask(engine, line.expert, line.prompt_tokens, line.tokens))
        finally:
            pacer.ended(line.expert)

    supervisor = asyncio.create_task(slot.supervise(asyncio.Lock()))
    try:
        async with slot.lease(next(iter(left)), 1, _TENANT):
            pass  # the engine serves
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as running:
            while left:
                model = await pacer.turn(tuple(left))
                running.create_task(one(left[model].popleft()))
                if not left[model]:
                    del left[model]
        took_s = time.monotonic() - began_s
    finally:
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor
    if len(came) != len(lines):
        raise RuntimeError(f"{len(came)} of {len(lines)} lines were answered")
    return sum(came) / took_s, sum(slot.swap_counts().values())


async def first_come(engine: SharedEngine, config: Config, lines: list[Ask]) -> tuple[float, int]:
    """Serve lines in the order of the file: tokens per second, and switches."""
    queue = Fcfs(
        engine, next(iter(config.experts)), capacity=config.pools[KIND].max_running, most_held=None
    )

    async def one(line: Ask) -> int:
        async with queue.lease(line.expert):
            return await ask(engine, line.expert, line.prompt_tokens, line.tokens)

    server = asyncio.create_task(queue.run())
    began_s = time.monotonic()
    try:
        tokens = await asyncio.gather(*(one(line) for line in lines))
    finally:
        server.cancel()
        with suppress(asyncio.CancelledError):
            await server
    return sum(tokens) / (time.monotonic() - began_s), queue.switches


async def measure(report: Report, *, lines: int) -> None:
    """Measure. Raises RuntimeError or CoeError where the engine can't be asked."""
    prepare()
    config = settings()
    names = list(config.experts)
    given = lines_of(names, lines)
    same = [Ask(0.0, names[0], line.prompt_tokens, line.tokens) for line in given]
    engine = SharedEngine(weights(config), config.pools[KIND].vllm)
    try:
        say("starting the engine")
        await engine.start()
        await ask(engine, names[0], 16, 4)
        say("one expert alone")
        alone_per_s, _ = await by_plan(engine, config, same)
        say("six experts, by plan")
        await engine.only(names[0], names)
        ours_per_s, swaps = await by_plan(engine, config, planned(given, names))
        say("six experts, first come, first served")
        await engine.only(names[0], names)
        fcfs_per_s, switches = await first_come(engine, config, given)
    finally:
        await engine.close()
    of_alone, times = ours_per_s / alone_per_s, ours_per_s / fcfs_per_s
    table = Table(f"{lines} lines, six experts, one slot", ("served", "tokens/s", "swaps"))
    table.rows += [
        ("one expert alone", f"{alone_per_s:.1f}", "0"),
        ("six, by plan", f"{ours_per_s:.1f}", str(swaps)),
        ("six, first come first served", f"{fcfs_per_s:.1f}", str(switches)),
    ]
    report.tables.append(table)
    report.reach += [
        TargetCheck("swaps, at most", len(names), swaps, swaps <= len(names)),
        TargetCheck(
            "of one expert's tokens/s, at least",
            _OF_ALONE,
            round(of_alone, 3),
            of_alone >= _OF_ALONE,
        ),
        TargetCheck(
            "times first come first served, at least", _TIMES, round(times, 3), times >= _TIMES
        ),
    ]
    report.facts |= {"of_alone": of_alone, "times_fcfs": times, "swaps": swaps}
