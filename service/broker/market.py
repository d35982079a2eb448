"""What a call of each expert is expected to cost, and how long its answer to be. No clock, no I/O.

Lengths are moving averages per category and expert, of what was seen here; where a
category has few, its expert's average over all of them stands in, by shrinkage.

An answer that was cut, by `max_tokens` or because its client left, is a censored observation: its
natural length is not known, only that it is at least so long. It counts as long as those of the
expert's whole answers that are longer, on average: its mass is redistributed to the right (Efron:
The Two Sample Problem with Censored Data, 1967).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.broker.board import Floats
from service.broker.price import Price

_EWMA = 0.05
# So many answers of a category weigh as much as the average over all.
_SHRINK = 8.0
# Until anything was seen.
USUAL_TOKENS = 64.0
# What an answer may need, of however many tokens its client allows.
LONG_TOKENS = 512
# Whole answers of an expert whose lengths are remembered for those that were cut.
_WHOLE = 64
# An answer longer than all those is taken for so many times as long as where it was cut.
_BEYOND = 2.0


@dataclass(frozen=True, slots=True)
class Expected:
    """For each expert (experts,): tokens of one answer, and spending of one call."""

    tokens: Floats
    cost: Floats


class Market:
    """Prices and lengths by index of expert and category; the last category is "not known"."""

    def __init__(
        self, experts: Sequence[str], categories: Sequence[str], prices: Mapping[str, Price]
    ) -> None:
        self._expert = {name: i for i, name in enumerate(experts)}
        self._category = {name: i for i, name in enumerate(categories)}
        self._sum = np.zeros((len(categories) + 1, len(experts)))
        self._weight = np.zeros((len(categories) + 1, len(experts)))
        self._usual = np.full(len(experts), USUAL_TOKENS)
        self._whole: list[deque[int]] = [deque(maxlen=_WHOLE) for _ in experts]
        self._unseen = True
        self.prices = tuple(prices[name] for name in experts)
        self._per_prompt = np.array([price.prompt for price in self.prices]) / 1e6
        self._per_answer = np.array([price.completion for price in self.prices]) / 1e6

    @property
    def per_token(self) -> Floats:
        """Cost of one token of prompt and one of answer together, (experts,)."""
        return self._per_prompt + self._per_answer

    def price(self, expert: str) -> Price:
        """Of one expert."""
        return self.prices[self._expert[expert]]

    def expect(
        self, category: str, prompt_tokens: int, most_tokens: int | None, answers: int = 1
    ) -> Expected:
        """What an answer to a prompt of this length is expected to come to.

        Args:
            category: Of the prompt.
            prompt_tokens: Length of all prompts of the request together.
            most_tokens: The client's bound on the length of an answer.
            answers: How many answers of that length are asked for at once.
        """
        row = self._category.get(category, -1)
        tokens = (self._sum[row] + _SHRINK * self._usual) / (self._weight[row] + _SHRINK)
        if most_tokens is not None:
            # Before any answer was seen, the bound itself is the best guess, within reason.
            tokens = (
                np.full_like(tokens, min(most_tokens, LONG_TOKENS))
                if self._unseen
                else np.minimum(tokens, most_tokens)
            )
        cost = self._per_prompt * prompt_tokens + self._per_answer * (answers * tokens)
        return Expected(tokens, cost)

    def saw(self, expert: str, category: str, tokens: int, *, cut: bool = False) -> None:
        """Learn from one answer.

        Args:
            expert: Whose answer it was.
            category: Of the prompt; one that is not known counts for the expert only.
            tokens: Length of the answer, as far as it came.
            cut: Whether the answer would have gone on: it reached its bound, or nobody waited for
                its end.
        """
        e = self._expert[expert]
        length = float(tokens)
        if cut:
            longer = [one for one in self._whole[e] if one > tokens]
            length = sum(longer) / len(longer) if longer else _BEYOND * tokens
            if not self._whole[e]:
                length = max(length, USUAL_TOKENS)
        else:
            self._whole[e].append(tokens)
        row = self._category.get(category, -1)
        self._sum[row, e] = (1 - _EWMA) * self._sum[row, e] + length
        self._weight[row, e] = (1 - _EWMA) * self._weight[row, e] + 1.0
        self._unseen = False
        # An expert's usual length leans on everybody's until it has enough of its own.
        sums, weights = self._sum.sum(axis=0), self._weight.sum(axis=0)
        everybody = sums.sum() / weights.sum()
        self._usual = (sums + _SHRINK * everybody) / (weights + _SHRINK)
