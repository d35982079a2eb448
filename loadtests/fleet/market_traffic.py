"""Requests of a model market: a few models get nearly all of them, and nobody knows which.

The skew is a published one (Xiang et al., "Aegaeon: Effective GPU Pooling for Concurrent LLM
Serving on the Market", SOSP 2025): 94.1 % of the models get 1.35 % of the requests, and a model
gets 0.037 requests/s on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RARE_MODELS, RARE_REQUESTS = 0.941, 0.0135
PER_MODEL_S = 0.037
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at_s: When it comes.
        expert: The expert that it names; None leaves the choice to the router.
        category: Its category, where the router chooses.
        prompt_tokens: The length of its prompt.
        answer_tokens: The length of its answer.
    """

    at_s: float
    expert: int | None
    category: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Pattern:
    """What is asked of a fleet, and when.

    Attributes:
        experts: The number of experts.
        per_s: Requests per second, as an average over the time.
        for_s: Seconds.
        skewed: Whether the experts have the market's shares; otherwise all have the same.
        daily: How far the rate goes up and down within a day, as a share of the average.
        day_s: The length of a day, which is compressed.
        bursts_per_s: How often an expert gets a burst.
        burst_times: By how much such an expert's rate is multiplied.
        burst_s: How long.
        viral_s: When an expert that nobody has asked for gets a tenth of all requests; None: never.
        auto: The share of requests that leave the choice to the router.
        categories: The number of categories of such requests.
    """

    experts: int
    per_s: float
    for_s: float
    skewed: bool = True
    daily: float = 0.0
    day_s: float = 600.0
    bursts_per_s: float = 0.0
    burst_times: float = 5.0
    burst_s: float = 10.0
    viral_s: float | None = None
    auto: float = 0.1
    categories: int = 8


VIRAL_SHARE = 0.1


def shares(experts: int, *, skewed: bool) -> Floats:
    """(experts,), the share of the requests that each expert gets, greatest first."""
    if not skewed:
        return np.full(experts, 1 / experts)
    hot = max(1, round((1 - RARE_MODELS) * experts))
    popular = 1 / np.arange(1, hot + 1)
    rare = np.full(experts - hot, RARE_REQUESTS / max(1, experts - hot))
    weights = np.concatenate([popular / popular.sum() * (1 - RARE_REQUESTS), rare])
    return np.asarray(weights / weights.sum())


def arrivals(pattern: Pattern, seed: int) -> list[Arrival]:
    """Draw the requests of a pattern, in the order of their times."""
    draw = np.random.default_rng(seed)
    # An expert's popularity says nothing of its place in the config.
    place = draw.permutation(pattern.experts)
    base = np.empty(pattern.experts)
    base[place] = shares(pattern.experts, skewed=pattern.skewed)
    viral = int(place[-1])
    bursts = _bursts(pattern, base, draw)
    found: list[Arrival] = []
    for second in range(int(np.ceil(pattern.for_s))):
        rate = pattern.per_s * (1 + pattern.daily * np.sin(2 * np.pi * second / pattern.day_s))
        rates = rate * base
        for began_s, expert in bursts:
            if began_s <= second < began_s + pattern.burst_s:
                rates[expert] *= pattern.burst_times
        if pattern.viral_s is not None and second >= pattern.viral_s:
            rates[viral] += VIRAL_SHARE * pattern.per_s
        found += _of_second(pattern, float(second), rates, draw)
    return [one for one in found if one.at_s < pattern.for_s]


def viral_expert(pattern: Pattern, seed: int) -> int:
    """The expert of `Pattern.viral_s`: one of the least popular ones."""
    return int(np.random.default_rng(seed).permutation(pattern.experts)[-1])


def mean_rates(pattern: Pattern, seed: int) -> Floats:
    """(experts,), requests per second of each expert, without bursts and the viral one."""
    place = np.random.default_rng(seed).permutation(pattern.experts)
    rates = np.empty(pattern.experts)
    rates[place] = pattern.per_s * shares(pattern.experts, skewed=pattern.skewed)
    return rates


def _bursts(
    pattern: Pattern, base: Floats, draw: np.random.Generator
) -> Sequence[tuple[float, int]]:
    count = int(draw.poisson(pattern.bursts_per_s * pattern.for_s))
    times = draw.uniform(0, pattern.for_s, count)
    return [(float(at_s), int(draw.choice(pattern.experts, p=base))) for at_s in times]


def _of_second(
    pattern: Pattern, second: float, rates: Floats, draw: np.random.Generator
) -> list[Arrival]:
    total = rates.sum()
    count = int(draw.poisson(total))
    if not count:
        return []
    times = np.sort(second + draw.random(count))
    experts = draw.choice(pattern.experts, size=count, p=rates / total)
    automatic = draw.random(count) < pattern.auto
    category = draw.integers(pattern.categories, size=count)
    prompts = np.clip(draw.lognormal(5.0, 0.9, count), 16, 3000).astype(int)
    answers = np.clip(draw.lognormal(4.7, 0.7, count), 4, 800).astype(int)
    return [
        Arrival(
            float(times[i]),
            None if automatic[i] else int(experts[i]),
            int(category[i]),
            int(prompts[i]),
            int(answers[i]),
        )
        for i in range(count)
    ]
