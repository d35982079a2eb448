"""Means and intervals of recorded outcomes, by expert and category. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from router_models.outcome_recording.outcome_file import Row

_Z = 1.959964  # of a 95 % interval
ALL = "all"


@dataclass(frozen=True, slots=True)
class Cell:
    """What an expert got on a category's prompts, or on all.

    Attributes:
        expert: The expert.
        category: The category; `all` for all prompts together.
        prompts: How many have a score.
        failed: How many have an error instead.
        score: The mean score.
        low: Lower end of the mean's 95 % interval.
        high: Its upper end.
        prompt_tokens: Mean tokens of a prompt; None where none were recorded. So are the next.
        completion_tokens: Mean tokens of an answer.
        cost: Mean cost of an answer, in units of price.
        seconds: Mean time of an answer.
        cut: Share of answers that were cut at their longest length.
    """

    expert: str
    category: str
    prompts: int
    failed: int
    score: float
    low: float
    high: float
    prompt_tokens: float | None
    completion_tokens: float | None
    cost: float | None
    seconds: float | None
    cut: float | None


def summarise(rows: Iterable[Row]) -> list[Cell]:
    """A cell for each expert and category in order of their names, then one for all prompts."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    failed: dict[tuple[str, str], int] = defaultdict(int)
    for row in rows:
        places = {ALL, str(row.get("category") or "-")}
        for expert, outcome in row["outcomes"].items():
            for category in places:
                found[expert, category].append(outcome)
        for expert in row.get("errors", {}):
            for category in places:
                failed[expert, category] += 1
    keys = sorted(found.keys() | failed.keys(), key=lambda key: (key[0], key[1] == ALL, key[1]))
    return [_cell(*key, found.get(key, []), failed.get(key, 0)) for key in keys]


def interval(mean: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a mean of scores in [0, 1], by Wilson (1927).

    It is made for scores of 0 and 1. For others it is too wide rather than too narrow, since none
    vary more.
    """
    if not count:
        return 0.0, 1.0
    z2 = _Z * _Z / count
    middle = (mean + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _cell(expert: str, category: str, outcomes: Sequence[dict[str, Any]], failed: int) -> Cell:
    scores = _values(outcomes, "score")
    mean = math.fsum(scores) / len(scores) if scores else math.nan
    low, high = interval(mean, len(scores))
    reasons = [outcome["finish_reason"] for outcome in outcomes if "finish_reason" in outcome]
    return Cell(
        expert,
        category,
        len(scores),
        failed,
        mean,
        low,
        high,
        _mean(outcomes, "prompt_tokens"),
        _mean(outcomes, "completion_tokens"),
        _mean(outcomes, "cost"),
        _mean(outcomes, "seconds"),
        reasons.count("length") / len(reasons) if reasons else None,
    )


def _mean(outcomes: Sequence[dict[str, Any]], name: str) -> float | None:
    values = _values(outcomes, name)
    return math.fsum(values) / len(values) if values else None


def _values(outcomes: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [
        float(outcome[name]) for outcome in outcomes if isinstance(outcome.get(name), int | float)
    ]
