"""Measures the time of one selection among 150 experts, 16 or 64 pools and 256 recipes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from loadtests.lib.median_intervals import Estimate, median
from loadtests.lib.targets_and_report import Report, Table, at_most
from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest, select
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.types import MAX_LATER, Recipe, Residency

EXPERTS, SLOTS, RECIPES = 150, 10, 256
POOLS = (16, 64)
TARGET_MS = 0.5
_WARM_UP = 50


def book_of(draw: random.Random) -> RecipeCatalog:
    """150 experts, and recipes of two and three of them: 256 in all."""
    names = [f"expert-{i}" for i in range(EXPERTS)]
    recipes: dict[Recipe, None] = {}
    while len(recipes) < RECIPES - EXPERTS:
        a, b, c = draw.sample(names, 3)
        kind = draw.choice(("cascade", "vote"))
        recipes[
            Recipe("vote", (a, b, c)) if kind == "vote" else Recipe("cascade", (a, b), (c,))
        ] = None
    return RecipeCatalog(names, recipes)


def pool_of(boot: str, names: tuple[str, ...], draw: random.Random) -> PoolView:
    """A pool of ten slots that can hold every expert, some of them resident, with queues."""
    experts = {
        name: ExpertState(
            draw.choice((Residency.DEVICE, Residency.HOST, Residency.DISK)),
            eta_s=draw.random() * 5,
            swap_s=0.5,
            slot=i % SLOTS,
        )
        for i, name in enumerate(names)
    }
    snapshot = Snapshot(
        boot=boot,
        kind="gpu",
        experts=experts,
        queues={name: Queue(draw.randint(0, 4), draw.randint(0, 8)) for name in names},
        capacity=dict.fromkeys(names, 32),
        speeds={name: Speed(0.1, 0.02 * draw.random(), 0.0001) for name in names},
    )
    return PoolView(boot, snapshot, 0.1, {})


def requests_of(catalog: RecipeCatalog) -> Iterator[SelectionRequest]:
    """Yield requests that may take any recipe, without end."""
    numbers = np.random.default_rng(1)
    rows = catalog.everything
    reach = numbers.random((len(rows), MAX_LATER)) * (catalog.later[rows] < len(catalog.experts))
    while True:
        yield SelectionRequest(
            rows=rows,
            quality=numbers.random(len(rows)),
            escalation_prob=reach,
            tokens=numbers.random(EXPERTS) * 200,
            cost=numbers.random(EXPERTS),
            prompt_tokens=200,
            cost_price=0.01,
            deadline_s=30.0,
        )


def measure(report: Report, rounds: int) -> None:
    """Time choices with every snapshot known, and with one or all of the pools' new each time."""
    table = Table(
        f"Choice among {EXPERTS} experts and {RECIPES} recipes, one core",
        ("pools", "whole snapshots since the last choice", "median ms", "95 % interval"),
    )
    report.tables.append(table)
    for pools in POOLS:
        for fresh in (0, 1, pools):
            measured = _choices(pools, fresh, rounds)
            spread = f"{measured.low:.3f}–{measured.high:.3f}"
            table.rows.append((str(pools), str(fresh), f"{measured.value:.3f}", spread))
            report.facts[f"choice_{pools}_pools_{fresh}_fresh_ms"] = measured.value
            if fresh <= 1:
                name = "none" if fresh == 0 else "one"
                report.reach.append(
                    at_most(
                        f"choice among {pools} pools, {name} of the snapshots new, ms",
                        TARGET_MS,
                        measured,
                    )
                )


def _choices(pools: int, fresh: int, rounds: int) -> Estimate:
    """The time of a choice in ms, each after `fresh` new snapshots."""
    draw = random.Random(1)
    book = book_of(draw)
    views = [pool_of(f"pool-{i}", book.experts, draw) for i in range(pools)]
    board = PoolStateTable(book.index)
    requests = requests_of(book)
    times = []
    for i in range(rounds + _WARM_UP):
        for k in range(fresh):
            at = (i + k) % pools
            snapshot = views[at].snapshot
            views[at] = replace(views[at], snapshot=replace(snapshot, seq=snapshot.seq + 1))
        request = next(requests)
        begun = time.perf_counter()
        best = select(book, board.to_matrix(views), request).best_position()
        times.append(1e3 * (time.perf_counter() - begun))
        assert best is not None
    return median(times[_WARM_UP:])
