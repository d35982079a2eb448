"""Mixed traffic: Poisson arrivals, experts by Zipf popularity, the same in every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """A request: arrival time, expert, prompt tokens and completion tokens."""

    at_s: float
    expert: str
    prompt_tokens: int
    tokens: int


def trace(
    experts: Sequence[str],
    *,
    per_s: float,
    for_s: float,
    seed: int,
    skew: float = 1.0,
    tokens: tuple[int, int] = (8, 32),
    prompt_tokens: tuple[int, int] = (16, 64),
) -> list[Ask]:
    """Arrivals over `for_s` seconds; the k-th expert is asked 1/k^skew as often as the first."""
    chance = random.Random(seed)
    weights = [1 / (k + 1) ** skew for k in range(len(experts))]
    asks: list[Ask] = []
    at_s = chance.expovariate(per_s)
    while at_s < for_s:
        asks.append(
            Ask(
                at_s,
                chance.choices(experts, weights)[0],
                chance.randint(*prompt_tokens),
                chance.randint(*tokens),
            )
        )
        at_s += chance.expovariate(per_s)
    return asks


def mean_tokens(tokens: tuple[int, int] = (8, 32)) -> float:
    """Tokens of a mean answer."""
    return sum(tokens) / 2
