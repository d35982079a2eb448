"""The shadow price of a budget: what one more unit of it is worth now, in quality. Pure.

The price is re-solved from what was on offer lately: it is the λ at which taking each of
the last requests' best option, by quality − λ · cost, would have spent on average what is left
of the budget for each request still to come. This is the resolving form of dual pricing
for online knapsacks (Agrawal, Wang, Ye: A Dynamic Near-Optimal Algorithm for Online Linear
Programming, 2014; Balseiro, Besbes, Pizarro: Survey of Dynamic Resource-Constrained Reward
Collection Problems, 2023). It steers before the cap is hit; the cap itself is the ledger's.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_REMEMBERED = 256
_EVERY = 16
# Options of one request that are kept: those that some price would choose.
_MOST_OPTIONS = 24
_HALVINGS = 40
_CALM_S = 60.0


@dataclass(frozen=True, slots=True)
class Purse:
    """A budget as of now. Times in s of one clock; `window`: (start, end).

    `reserved` is held by requests under way, most of which will not be spent.
    """

    amount: float
    spent: float
    start_s: float
    end_s: float
    reserved: float = 0.0

    @property
    def left(self) -> float:
        """What can still be promised."""
        return max(0.0, self.amount - self.spent - self.reserved)


class Pacer:
    """Prices one budget. `offered` every decision that concerns it, `repriced` as it is spent."""

    def __init__(self) -> None:
        self.price = 0.0
        self._seen: deque[tuple[Floats, Floats]] = deque(maxlen=_REMEMBERED)
        self._since = 0
        self._arrivals = 0.0
        self._window = (math.nan, math.nan)
        self._from_s = math.nan

    def offered(self, worth: Floats, cost: Floats) -> None:
        """The options of one request: quality less the price of time, and expected cost.

        Options that are impossible have a worth of -inf.
        """
        self._arrivals += 1.0
        self._since += 1
        keep = hull(worth, cost)
        if len(keep):
            self._seen.append((worth[keep], cost[keep]))

    def due(self) -> bool:
        """Whether it is time to reprice."""
        return self._since >= _EVERY or (self._since > 0 and len(self._seen) < _EVERY)

    def reprice(self, purse: Purse, now_s: float) -> float:
        """The price for what is left of the window at the rate at which requests came in it."""
        self._since = 0
        if (purse.start_s, purse.end_s) != self._window:
            # In a new window arrivals are counted anew; what was on offer is still the best guess.
            first = math.isnan(self._window[0])
            self._window = (purse.start_s, purse.end_s)
            self._arrivals = self._arrivals if first else min(self._arrivals, 1.0)
            self._from_s = max(now_s, purse.start_s) if first else purse.start_s
        if not self._seen:
            return self.price
        span_s = purse.end_s - purse.start_s
        # A burst at the start is no rate yet.
        calm_s = min(_CALM_S, span_s / 100)
        rate = self._arrivals / (max(now_s - self._from_s, 0.0) + calm_s)
        coming = rate * max(purse.end_s - now_s, 0.0)
        left = max(0.0, purse.amount - purse.spent)
        self.price = self.solve(left / max(coming, 1.0))
        return self.price

    def solve(self, each: float) -> float:
        """The least λ at which the requests remembered would have spent `each` or less on average.

        0 where they would at no price; the greatest useful one where they can't.
        """
        if not self._seen:
            return 0.0
        width = max(len(cost) for _, cost in self._seen)
        worth = np.full((len(self._seen), width), -np.inf)
        cost = np.zeros((len(self._seen), width))
        for row, (w, c) in enumerate(self._seen):
            worth[row, : len(w)], cost[row, : len(c)] = w, c
        rows = np.arange(len(worth))

        def spends(price: float) -> float:
            return float(cost[rows, (worth - price * cost).argmax(axis=1)].mean())

        if spends(0.0) <= each:
            return 0.0
        low, high = 0.0, _steepest(worth, cost)
        if spends(high) > each:
            return high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if spends(middle) > each else (low, middle)
            if high - low <= 1e-3 * high:
                break
        return high


def _steepest(worth: Floats, cost: Floats) -> float:
    """A price at which everybody takes the cheapest: more than any quality per unit of cost."""
    finite = np.isfinite(worth)
    spread = float(worth[finite].max() - worth[finite].min())
    costs = np.unique(cost[finite])
    gaps = np.diff(costs)
    gaps = gaps[gaps > 1e-9 * max(costs[-1], 1e-300)]
    return (spread + 1e-9) / float(gaps.min()) if len(gaps) else 0.0


def hull(worth: Floats, cost: Floats) -> NDArray[np.intp]:
    """Options that some price from 0 up would choose, cheapest first: the upper concave hull.

    At most 24 of them, evenly.
    """
    order = np.flatnonzero(np.isfinite(worth))
    order = order[np.lexsort((-worth[order], cost[order]))]
    # Who costs more than somebody better is out, which leaves few for what follows.
    best = np.maximum.accumulate(worth[order])
    order = order[np.concatenate(([True], best[1:] > best[:-1]))] if len(order) else order
    kept: list[int] = []
    for i in order.tolist():
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (worth[b] - worth[a]) * (cost[i] - cost[a]) > (worth[i] - worth[a]) * (
                cost[b] - cost[a]
            ):
                break
            kept.pop()
        kept.append(i)
    if len(kept) > _MOST_OPTIONS:
        kept = [kept[i] for i in np.linspace(0, len(kept) - 1, _MOST_OPTIONS).astype(int)]
    return np.array(kept, dtype=np.intp)
