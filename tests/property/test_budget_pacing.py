"""Several gateways spend one budget about as well as one gateway does."""

from __future__ import annotations

import statistics

import pytest

from loadtests.budget_pacing import MOST_LOST, SCENES, Scene, WindowResult, simulate

DAY, NOON, MINUTE = SCENES
SEEDS = range(3)


async def outcomes(scene: Scene, gateways: int) -> list[WindowResult]:
    return [await simulate(scene, gateways, seed) for seed in SEEDS]


@pytest.mark.parametrize("scene", [DAY, MINUTE], ids=["day", "minute"])
async def test_budget_pacing_of_several_gateways_loses_at_most_two_percent_quality(
    scene: Scene,
) -> None:
    alone = statistics.mean(outcome.quality for outcome in await outcomes(scene, 1))
    for gateways in (2, 4, 8):
        found = await outcomes(scene, gateways)
        assert statistics.mean(outcome.quality for outcome in found) >= (1 - MOST_LOST) * alone
        assert all(outcome.spent <= scene.amount for outcome in found)


async def test_budget_pacing_of_eight_gateways_spends_half_by_half_of_the_window() -> None:
    for outcome in await outcomes(DAY, 8):
        assert outcome.marks[1] == pytest.approx(0.5, abs=0.06)
        assert outcome.marks[3] >= 0.97
