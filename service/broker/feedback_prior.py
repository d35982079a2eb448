"""Corrects the expected quality of a recipe by votes. Pure.

A vote is a score in [0, 1] for an answer of one recipe to a prompt of one category. The corrected
quality is a weighted mean of the prior quality and the votes. The prior has the weight of a few
votes (`prior_votes`). The weight of a vote halves with each half-life.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

# Number of votes and sum of their scores. Both are discounted by age.
Tally = tuple[float, float]

# Number of time slices per half-life. Votes are counted for each slice.
SLICES = 4
# Votes older than this many half-lives do not count.
HALF_LIVES = 4
# Scores are counted in whole thousandths, so that their sums are exact.
SCALE = 1000


def slice_of(now_s: float, half_life_s: float) -> int:
    """The number of the time slice that contains `now_s`."""
    return int(now_s // (half_life_s / SLICES))


def recent(now_s: float, half_life_s: float) -> list[int]:
    """The numbers of the time slices that count, newest first."""
    newest = slice_of(now_s, half_life_s)
    return [newest - i for i in range(SLICES * HALF_LIVES)]


def prior_votes(votes: int) -> float:
    """The weight of the prior, in votes. `votes` votes then have four fifths of all weight."""
    return votes / 4


def tally(slices: Iterable[Mapping[str, int]]) -> dict[str, dict[str, Tally]]:
    """Add up the votes on each subject, by voter.

    Args:
        slices: The counts of each time slice, newest first, under the names of `fields`.
    """
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
    """The counts to add for one vote, by name of their field in the store."""
    return {f"{subject}\n{voter}/n": 1, f"{subject}\n{voter}/sum": round(score * SCALE)}


def shift(voters: Mapping[str, Tally], believed: float, votes: int, max_shift: float) -> float:
    """The correction to add to the prior quality.

    One voter counts as at most `votes` votes, so that it can't outvote the others by repetition.

    Args:
        voters: The votes of each voter.
        believed: The prior quality, in [0, 1].
        votes: The number of votes that make four fifths of all weight.
        max_shift: The bound of the correction, in both directions.
    """
    weight = total = 0.0
    for count, score in voters.values():
        if count > 0:
            counts = min(count, float(votes))
            weight += counts
            total += counts * score / count
    if not weight:
        return 0.0
    joined = (prior_votes(votes) * believed + total) / (prior_votes(votes) + weight)
    return max(-max_shift, min(max_shift, joined - believed))
