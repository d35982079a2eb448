"""What votes say: how far a recipe is from what was believed of it. Pure.

A vote is a score in [0, 1] for an answer of one recipe to a prompt of one category. What is
believed and what was voted are joined as a mean, in which the belief counts like
`prior` votes, and every vote less as time passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# How many votes, and the sum of their scores, both faded.
Tally = tuple[float, float]

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


def tally(slices: Iterable[Mapping[str, int]]) -> dict[str, dict[str, Tally]]:
    """What was voted on each subject, by voter. `slices`, newest first, are counts by `field`."""
    found: dict[str, dict[str, Tally]] = {}
    for age, counts in enumerate(slices):
        fades = math.exp2(-age / SLICES)
        for name, count in counts.items():
            what, _, kind = name.rpartition("/")
            subject, _, voter = what.rpartition("\n")
            weight, total = found.setdefault(subject, {}).get(voter, (0.0, 0.0))
            if kind == "n":
                weight += fades * count
            else:
                total += fades * count / SCALE
            found[subject][voter] = (weight, total)
    return found


def fields(subject: str, voter: str, score: float) -> dict[str, int]:
    """The counts to add for one vote."""
    return {f"{subject}\n{voter}/n": 1, f"{subject}\n{voter}/sum": round(score * SCALE)}


def shift(voters: Mapping[str, Tally], believed: float, votes: int, max_shift: float) -> float:
    """What to add to `believed`, by what each voter said.

    A voter counts as `votes` votes at most, however many it gave: more of them change nothing
    against what others say.
    """
    weight = total = 0.0
    for said, score in voters.values():
        if said > 0:
            counts = min(said, float(votes))
            weight += counts
            total += counts * score / said
    if not weight:
        return 0.0
    joined = (prior_votes(votes) * believed + total) / (prior_votes(votes) + weight)
    return max(-max_shift, min(max_shift, joined - believed))
