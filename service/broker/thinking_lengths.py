"""Learned lengths of thinking, by expert and category. Pure.

A budget of thinking is a quantile of the lengths that an expert's thinking had on a category, so
that easy prompts think little. A thinking that a budget ended is a censored observation: only a
lower bound of its natural length is known. Quantiles are those of the product-limit estimate
(Kaplan, Meier: Nonparametric Estimation from Incomplete Observations, 1958). Taken as they are,
lengths that a budget has cut would lower the next budget, and so on to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats

# Lengths that are remembered, the newest ones.
_REMEMBERED = 512
# Fewer lengths make no budget.
_FEWEST = 50
# So many lengths above a quantile are needed, on average.
_ABOVE = 3.0
# A smaller budget would save nothing.
_LEAST_TOKENS = 16
# Where too many lengths were cut to know the quantile: the factor of the longest one.
_BEYOND = 2.0


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

    def budget(self, expert: str, category: str, quantile: float) -> int | None:
        """Return the length that this share of the expert's thinking keeps within.

        It is that of the category, or where too few lengths of it are known, of all categories.

        Args:
            expert: The expert.
            category: The prompt's category; empty where it was not classified.
            quantile: The share, in (0, 1).

        Returns:
            The budget in tokens; None where too little is known.
        """
        fewest = max(_FEWEST, math.ceil(_ABOVE / (1 - quantile)))
        for key in ((expert, category), (expert, "")):
            found = self._samples.get(key)
            if found is not None and found.count >= fewest:
                return max(_LEAST_TOKENS, found.quantile(quantile))
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
        self._quantiles: dict[float, int] = {}

    @property
    def count(self) -> int:
        return min(self._added, _REMEMBERED)

    def add(self, tokens: int, *, cut: bool) -> None:
        self._ring[self._added % _REMEMBERED] = -1 - tokens if cut else tokens
        self._added += 1
        self._quantiles.clear()

    def excess(self, budget: int) -> float:
        return float(np.maximum(self._lengths() - budget, 0.0).mean())

    def quantile(self, share: float) -> int:
        if (known := self._quantiles.get(share)) is None:
            cut = self._ring[: self.count] < 0
            known = self._quantiles[share] = product_limit_quantile(self._lengths(), cut, share)
        return known

    def _lengths(self) -> Floats:
        ring = self._ring[: self.count]
        return np.where(ring < 0, -1 - ring, ring).astype(np.float64)


def product_limit_quantile(lengths: Floats, cut: NDArray[np.bool_], share: float) -> int:
    """Return the least length that this share of all lengths keeps within, by Kaplan and Meier.

    Args:
        lengths: (answers,), lengths in tokens, as far as they came; at least one.
        cut: (answers,), whether each would have gone on.
        share: The share, in (0, 1).

    Returns:
        The quantile; where too many lengths were cut to know it, twice the longest one.
    """
    # Of equal lengths those that ended by themselves come first: the others were longer.
    order = np.lexsort((cut, lengths))
    at_risk = len(lengths) - np.arange(len(lengths))
    beyond = np.cumprod(np.where(cut[order], 1.0, 1.0 - 1.0 / at_risk))
    within = np.flatnonzero(1.0 - beyond >= share - 1e-12)
    if not len(within):
        return math.ceil(_BEYOND * float(lengths.max()))
    return math.ceil(float(lengths[order][within[0]]))
