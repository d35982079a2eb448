"""Compares the quality that 1, 2, 4 and 8 gateways get from one budget.

Run: python -m loadtests.budget_pacing

Requests come at random times to random gateways. Each has a free answer, and a better answer for
one unit of cost; the gain is random. The gateways' own prices decide, and the ledger enforces the
budget. Everything except for the requests and the clock is the service's own code. The test passes
if the quality of several gateways is within 2 % of one gateway's, with the same budget and the same
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from service.broker.limit_and_budget_ledger import Ledger, UsageBound
from service.broker.selection import Selection
from service.config import Config
from service.errors import RateLimitExceededError
from service.gateway.budget_prices import RENEW_IDLE_S, BudgetPrices
from service.store.memory_store import MemoryStore
from service.types import NOBODY, Usage

GATEWAYS = (1, 2, 4, 8)
# So much of one gateway's quality may be lost.
MOST_LOST = 0.02
# As often as gateways look at budgets while requests come.
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Scene:
    """A budget and the requests of its window.

    Attributes:
        window_s: Length of the window.
        requests: How many come in it, on average.
        amount: Units of cost that may be spent in it.
        peak: How much oftener they come in the middle than on average; 0: evenly.
    """

    name: str
    window_s: int
    requests: int
    amount: int
    peak: float = 0.0


SCENES = (
    Scene("a day, one request in 43 s", 86_400, 2000, 500),
    Scene("a day with a noon", 86_400, 2000, 500, peak=1.0),
    Scene("a minute, 50 requests in 1 s", 60, 3000, 750),
)


@dataclass(frozen=True, slots=True)
class WindowResult:
    """The result of one window.

    Attributes:
        quality: Gained over the answers that cost nothing.
        spent: Units of cost.
        marks: Share of the budget that was spent by each quarter of the window.
        refused: Times that the better answer was chosen and the ledger had nothing left.
    """

    quality: float
    spent: float
    marks: tuple[float, ...]
    refused: int


@dataclass(frozen=True, slots=True)
class _Offer:
    """The fields of a weighed request that `BudgetPrices` reads."""

    net_quality: NDArray[np.float64]
    cost: NDArray[np.float64]


async def simulate(scene: Scene, gateways: int, seed: int) -> WindowResult:
    """Simulate one window; a seed gives the same requests for any number of gateways."""
    draw = np.random.default_rng(seed)
    times = _times(scene, draw)
    gains = draw.uniform(0, 1, len(times))
    spread = np.random.default_rng(seed + 1_000_000).integers(gateways, size=len(times))
    now_s = 0.0

    def clock() -> float:
        return now_s

    store = MemoryStore(clock)
    config = Config.model_validate(
        {
            "experts": {"e": {"model": "m"}},
            "pools": {"p": {"engine": "simulated"}},
            "budgets": {"all": {"amount": scene.amount, "window_s": scene.window_s}},
        }
    )
    ledger = Ledger(config, store)
    all_spending = [BudgetPrices(ledger, store, clock=clock) for _ in range(gateways)]
    for item in all_spending:
        await item.refresh()
    looked_s = [0.0] * gateways
    quality, refused = 0.0, 0
    marks: list[float] = []
    spent = 0
    cost = np.array([0.0, 1.0])
    for i, (at_s, gain, which) in enumerate(zip(times, gains, spread, strict=True)):
        now_s = float(at_s)
        while len(marks) < 4 * now_s / scene.window_s - 1:
            marks.append(spent / scene.amount)
        spending, worth = all_spending[which], np.array([0.0, gain])
        if now_s - looked_s[which] >= RENEW_IDLE_S:
            await spending.refresh()
        better = int((worth - spending.cost_price(NOBODY) * cost).argmax()) == 1
        spending.observe(NOBODY, cast(Selection, _Offer(worth, cost)))
        if better:
            try:
                held = await ledger.reserve(f"r{i}", NOBODY, UsageBound(0, prompt_cost=1.0))
            except RateLimitExceededError:
                refused += 1
            else:
                await ledger.settle(held, Usage(cost=1.0), ended_s=now_s)
                quality, spent = quality + float(gain), spent + 1
        if now_s - looked_s[which] >= _LOOK_S:
            looked_s[which] = now_s
            await spending.refresh()
    for item in all_spending:
        await item.stop()
    marks += [spent / scene.amount] * (4 - len(marks))
    return WindowResult(quality, spent, tuple(marks), refused)


def _times(scene: Scene, draw: np.random.Generator) -> NDArray[np.float64]:
    """When requests come, s from the window's start: a Poisson process."""
    count = int(draw.poisson(scene.requests * (1 + scene.peak)))
    at = np.sort(draw.random(count))
    kept = draw.random(count) * (1 + scene.peak) <= 1 - scene.peak * np.cos(2 * np.pi * at)
    return at[kept] * scene.window_s


def best(scene: Scene, seed: int) -> float:
    """The most quality that the budget could buy, all requests known before."""
    draw = np.random.default_rng(seed)
    gains = draw.uniform(0, 1, len(_times(scene, draw)))
    return float(np.sort(gains)[::-1][: scene.amount].sum())


def main(argv: list[str] | None = None) -> int:
    """Print a table; 1 where some number of gateways loses more than 2 %."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.budget_pacing", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of windows of each scene")
    seeds = range(parser.parse_args(argv).seeds)
    failed = False
    for scene in SCENES:
        optimum = statistics.mean(best(scene, seed) for seed in seeds)
        print(f"{scene.name}: {scene.requests} requests, budget {scene.amount}")
        alone = 0.0
        for gateways in GATEWAYS:
            all_of = [asyncio.run(simulate(scene, gateways, seed)) for seed in seeds]
            quality = statistics.mean(item.quality for item in all_of)
            alone = alone or quality
            marks = [
                statistics.mean(at) for at in zip(*(item.marks for item in all_of), strict=True)
            ]
            failed |= quality < (1 - MOST_LOST) * alone
            print(
                f"  {gateways} gateways: quality {quality:7.1f}, {100 * quality / alone:6.2f} % of "
                f"one's, {100 * quality / optimum:5.1f} % of the optimum; spent by quarters "
                f"{' '.join(f'{100 * mark:3.0f}' for mark in marks)} %; refused "
                f"{sum(item.refused for item in all_of)}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
