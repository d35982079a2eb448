"""What an answer costs. Pure: prices and tokens in, units of cost out.

One unit is whatever the config's prices are in: money, or billions of parameters
computed. A price is for a million tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from service.config import Config

_PER = 1_000_000
# Costs are counted in whole millionths of a unit, so that sums are exact.
MICRO = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """Units of cost per million prompt tokens, and per million tokens of an answer."""

    prompt: float = 0.0
    completion: float = 0.0


def cost(price: Price, prompt_tokens: int, completion_tokens: int) -> float:
    """Units of cost of an answer."""
    return (price.prompt * prompt_tokens + price.completion * completion_tokens) / _PER


def micro(units: float) -> int:
    """Units of cost in whole millionths, rounded up: nothing is ever charged too little."""
    # What is off by less than a billionth of a millionth is floating point, not money.
    return max(0, math.ceil(round(units * MICRO, 6)))


def prices_of(config: Config) -> dict[str, Price]:
    """Every expert's price; nothing where the config names none."""
    return {
        name: Price(expert.price.prompt, expert.price.completion) if expert.price else Price()
        for name, expert in config.experts.items()
    }
