"""A bound on what a recording costs: the worst case of each call is reserved before it is sent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.broker.token_prices import Price, cost

# Tokens that templates and an expert's own system prompt may add to a prompt.
_TEMPLATE_TOKENS = 1024
_TOKENS_PER_MESSAGE = 16
# Costs are counted in whole parts of a unit, so that sums are exact.
_PARTS = 10**12


class CostBoundReachedError(Exception):
    """The next call could pass the bound, and no call in flight can free anything."""


@dataclass(slots=True)
class WorstCase:
    """The most that a call can cost, by an expert's price.

    No tokenizer makes more tokens of a text than it has bytes. What a template adds is learned
    where it is more than was thought.

    Attributes:
        prices: Each expert's price; a missing one is free.
    """

    prices: Mapping[str, Price]
    _added: dict[str, int] = field(default_factory=dict)

    def of(self, expert: str, messages: list[dict[str, str]], max_tokens: int) -> float:
        """The most that this call can cost, in units of price."""
        tokens = prompt_bytes(messages) + self._added.get(expert, _TEMPLATE_TOKENS)
        tokens += _TOKENS_PER_MESSAGE * len(messages)
        return cost(self.prices.get(expert, Price()), tokens, max_tokens)

    def seen(self, expert: str, messages: list[dict[str, str]], prompt_tokens: int) -> None:
        """Learn from a call's tokens."""
        added = 2 * (prompt_tokens - prompt_bytes(messages))
        if added > self._added.get(expert, _TEMPLATE_TOKENS):
            self._added[expert] = added


class CostBound:
    """Reserves and settles costs, counted exactly and rounded up.

    Args:
        limit: The most that may be spent, in units of price; infinite for no bound.
        spent: What was spent before.
    """

    def __init__(self, limit: float = math.inf, spent: float = 0.0) -> None:
        self._limit = math.inf if math.isinf(limit) else math.floor(limit * _PARTS)
        self._spent = _parts(spent)
        self._reserved = 0
        self._changed = asyncio.Condition()

    @property
    def spent(self) -> float:
        """What was spent, in units of price."""
        return self._spent / _PARTS

    @property
    def reserved(self) -> float:
        """The worst case of the calls in flight."""
        return self._reserved / _PARTS

    async def reserve(self, worst: float) -> None:
        """Reserve a call's worst case, after waiting for calls in flight where that is needed.

        Raises:
            CostBoundReachedError: It does not fit, and no call is in flight.
        """
        async with self._changed:
            while self._spent + self._reserved + _parts(worst) > self._limit:
                if not self._reserved:
                    self._changed.notify_all()
                    raise CostBoundReachedError
                await self._changed.wait()
            self._reserved += _parts(worst)

    async def settle(self, worst: float, actual: float) -> None:
        """Replace a reservation by what the call has cost."""
        async with self._changed:
            self._reserved -= _parts(worst)
            self._spent += _parts(actual)
            self._changed.notify_all()


def _parts(units: float) -> int:
    return max(0, math.ceil(units * _PARTS))


def prompt_bytes(messages: list[dict[str, str]]) -> int:
    """Bytes of all messages."""
    return sum(len(message["content"].encode()) for message in messages)
