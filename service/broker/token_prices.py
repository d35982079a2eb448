"""The cost of an answer, from its price and its tokens. Pure.

The config chooses the unit of cost: computation, or a currency. Prices are per million tokens.
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
    """The price of an expert.

    Attributes:
        prompt: Units of cost per million prompt tokens.
        completion: Units of cost per million tokens of an answer.
    """

    prompt: float = 0.0
    completion: float = 0.0


def cost(price: Price, prompt_tokens: int, completion_tokens: int) -> float:
    """The cost of an answer, in units of cost."""
    return (price.prompt * prompt_tokens + price.completion * completion_tokens) / _PER


def micro(units: float) -> int:
    """Convert units of cost to whole millionths. It rounds up, so no charge is too small."""
    # Rounding to six digits first removes floating-point errors, which must not cost a millionth.
    return max(0, math.ceil(round(units * MICRO, 6)))


def prices_of(config: Config) -> dict[str, Price]:
    """The price of every expert; zero if the config has none.

    `service.default_prices.with_default_prices` fills in the default prices of local experts.
    """
    return {
        name: Price(expert.price.prompt, expert.price.completion) if expert.price else Price()
        for name, expert in config.experts.items()
    }
