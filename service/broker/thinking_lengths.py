"""Learned lengths of thinking, by expert and category, and what they are worth. Pure.

A thinking that has ended gives its answer, and each further token costs time and money. The budget
B of an expert on a category is the one of the greatest utility,

    U(B) = Q · P(T ≤ B) − λ · E[min(T, B)]

- T: the natural length of its thinking on the category
- Q: expected quality of its answer to this prompt, in [0, 1]; that of a cut one counts as 0
- λ: the price of a token, in quality: its cost and its time, at the prices of the choice

with the terms of the choice among experts (`service/broker/selection.py`), but never one that less
than a given share of all thinking keeps within. Easy prompts then think little, and thinking that
goes on for ever is cut, while long thinking that leads to answers is not.

A thinking that a budget ended is a censored observation: only a lower bound of its natural length
is known. The distribution of T is therefore the product-limit estimate (Kaplan, Meier:
Nonparametric Estimation from Incomplete Observations, 1958). Taken as they are, lengths that a
budget has cut would lower the next budget, and so on to nothing. Where the longest lengths are all
cut, the rest is taken to end at twice the longest one, so that short budgets are tried again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats

# Lengths that are remembered, the newest ones.
_REMEMBERED = 512
# Fewer lengths make no budget.
_FEWEST = 50
# So many lengths above a quantile are needed, on average.
_ABOVE = 3.0
# The greatest length of the ring's type; what an endpoint tells may be greater.
_MOST_TOKENS = 2**31 - 1
# A smaller budget would save nothing.
_LEAST_TOKENS = 16
# Where the longest lengths are all cut: the factor at which the rest is taken to end.
_BEYOND = 2.0


@dataclass(frozen=True, slots=True)
class ThinkingWorth:
    """What an expert's thinking is worth for one prompt.

    Attributes:
        quality: Expected quality of its answer, in [0, 1].
        token_price: What a token costs, in quality.
    """

    quality: float = 1.0
    token_price: float = 0.0


class ThinkingLengths:
    """Lengths of thinking by names of experts and categories. It outlives a config."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, str], _Samples] = {}

    def observe(self, expert: str, category: str, tokens: int, *, cut: bool) -> None:
        """Add the length of the thinking of one answer.

        Args:
            expert: The expert that thought.
            category: The prompt's category; empty where it was not classified.
            tokens: The length, as far as it came.
            cut: Whether it would have gone on.
        """
        for key in {(expert, category), (expert, "")}:
            self._samples.setdefault(key, _Samples()).add(tokens, cut=cut)

    def seed(self, expert: str, category: str, samples: Iterable[int]) -> None:
        """Begin with recorded lengths, unless the expert has thought about the category before.

        Args:
            expert: The expert.
            category: The category.
            samples: Lengths in tokens; −1−n for a thinking that was cut at n.
        """
        if (expert, category) in self._samples:
            return
        for sample in samples:
            cut = sample < 0
            self.observe(expert, category, -1 - sample if cut else sample, cut=cut)

    def budget(
        self, expert: str, category: str, least_share: float, worth: ThinkingWorth
    ) -> int | None:
        """Return the budget of the greatest utility.

        The lengths are those of the category, or where too few of it are known, of all categories.

        Args:
            expert: The expert.
            category: The prompt's category; empty where it was not classified.
            least_share: The share of all thinking that has to keep within it, in (0, 1).
            worth: What the thinking is worth.

        Returns:
            The budget in tokens; None where too little is known, or no budget is worth while.
        """
        fewest = max(_FEWEST, math.ceil(_ABOVE / (1 - least_share)))
        for key in ((expert, category), (expert, "")):
            found = self._samples.get(key)
            if found is not None and found.count >= fewest:
                budget = found.distribution().best(least_share, worth)
                return None if budget is None else max(_LEAST_TOKENS, budget)
        return None

    def excess(self, expert: str, category: str, budget: int) -> float:
        """Return the expected tokens of thinking beyond a budget; 0 where nothing is known."""
        for key in ((expert, category), (expert, "")):
            found = self._samples.get(key)
            if found is not None and found.count >= _FEWEST:
                return found.excess(budget)
        return 0.0

    def forget(self, experts: Iterable[str]) -> None:
        """Delete the observations of these experts."""
        gone = set(experts)
        self._samples = {key: found for key, found in self._samples.items() if key[0] not in gone}


class _Samples:
    """The newest lengths of one expert on one category. A negative number −1−n: cut at n."""

    def __init__(self) -> None:
        self._ring: NDArray[np.int32] = np.zeros(_REMEMBERED, dtype=np.int32)
        self._added = 0
        self._distribution: LengthDistribution | None = None

    @property
    def count(self) -> int:
        return min(self._added, _REMEMBERED)

    def add(self, tokens: int, *, cut: bool) -> None:
        tokens = min(tokens, _MOST_TOKENS)
        self._ring[self._added % _REMEMBERED] = -1 - tokens if cut else tokens
        self._added += 1
        self._distribution = None

    def excess(self, budget: int) -> float:
        return float(np.maximum(self._lengths() - budget, 0.0).mean())

    def distribution(self) -> LengthDistribution:
        if self._distribution is None:
            cut = self._ring[: self.count] < 0
            self._distribution = LengthDistribution(self._lengths(), cut)
        return self._distribution

    def _lengths(self) -> Floats:
        ring = self._ring[: self.count]
        return np.where(ring < 0, -1 - ring, ring).astype(np.float64)


class LengthDistribution:
    """The product-limit estimate of a distribution of lengths.

    Args:
        lengths: (answers,), lengths in tokens, as far as they came; at least one.
        cut: (answers,), whether each would have gone on.
    """

    def __init__(self, lengths: Floats, cut: NDArray[np.bool_]) -> None:
        # Of equal lengths those that ended by themselves come first: the others were longer.
        order = np.lexsort((cut, lengths))
        at_risk = len(lengths) - np.arange(len(lengths))
        beyond = np.cumprod(np.where(cut[order], 1.0, 1.0 - 1.0 / at_risk))
        points = lengths[order]
        # The last point stands for what is not known, and for no budget at all.
        self._points = np.append(points, max(points[-1], math.ceil(_BEYOND * points[-1])))
        self._within = np.append(1.0 - beyond, 1.0)
        # Expected tokens up to a point: the integral of the share that is still thinking.
        steps = np.diff(self._points, prepend=0.0)
        self._spent = np.cumsum(steps * np.concatenate(([1.0], 1.0 - self._within[:-1])))

    def quantile(self, share: float) -> int:
        """Return the least length that this share of all lengths keeps within.

        It is twice the longest known one where too many were cut to know it.
        """
        return math.ceil(float(self._points[self._first_with(share)]))

    def best(self, least_share: float, worth: ThinkingWorth) -> int | None:
        """Return the budget of the greatest utility; None where it is better to have none.

        Args:
            least_share: The share of all lengths that has to keep within it.
            worth: What the thinking is worth.
        """
        utility = worth.quality * self._within - worth.token_price * self._spent
        first = self._first_with(least_share)
        at = first + int(utility[first:].argmax())
        # All that is known keeps within the last length: a budget there would cut the unknown.
        within_all = at == len(utility) - 1 or self._within[at] >= 1.0 - 1e-12
        return None if within_all else math.ceil(float(self._points[at]))

    def _first_with(self, share: float) -> int:
        return int(np.flatnonzero(self._within >= share - 1e-12)[0])
