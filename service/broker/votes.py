"""What votes say: how far a recipe is from what was believed of it. Pure.

A vote is a score in [0, 1] for an answer of one recipe to a prompt of one category. What is
believed and what was voted are joined as a mean, in which the belief counts like
`prior` votes, and every vote less as time passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Votes are counted in so many slices of a half-life.
SLICES = 4
# What is older than so many half-lives no longer counts.
HALF_LIVES = 4
# Scores are counted in whole thousandths, so that sums are exact.
SCALE = 1000


def slice_of(now_s: float, half_life_s: float) -> int:
    """The slice of time that now is."""
    return int(now_s // (half_life_s / SLICES))


def recent(now_s: float, half_life_s: float) -> list[int]:
    """The slices that count, newest first."""
    newest = slice_of(now_s, half_life_s)
    return [newest - i for i in range(SLICES * HALF_LIVES)]


def prior_votes(votes: int) -> float:
    """As how many votes the belief counts, so that `votes` of them make four fifths."""
    return votes / 4


def shift(
    slices: list[Mapping[str, int]], key: str, believed: float, votes: int, max_shift: float
) -> float:
    """What to add to `believed`. `slices`, newest first, hold `KEY/n` and `KEY/sum`."""
    weight = total = 0.0
    for age, counts in enumerate(slices):
        count = counts.get(f"{key}/n", 0)
        if count:
            fades = math.exp2(-age / SLICES)
            weight += fades * count
            total += fades * counts.get(f"{key}/sum", 0) / SCALE
    if not weight:
        return 0.0
    joined = (prior_votes(votes) * believed + total) / (prior_votes(votes) + weight)
    return max(-max_shift, min(max_shift, joined - believed))
