"""The shadow price of a budget: the quality that one more unit of it would buy. Pure.

The price is solved again from the options of the last requests: it is the λ at which taking the
best option of each, by quality − λ · cost, would have spent on average as much as the budget has
left for each request still to come. This is the resolving form of dual pricing
for online knapsacks (Agrawal, Wang, Ye: A Dynamic Near-Optimal Algorithm for Online Linear
Programming, 2014; Balseiro, Besbes, Pizarro: Survey of Dynamic Resource-Constrained Reward
Collection Problems, 2023). It steers before the cap is hit; the cap itself is the ledger's.

Where several gateways spend one budget, each learns the options from its own requests. The rest of
the budget is for the requests of all gateways, so they share the numbers of arrivals (`unreported`,
`set_arrivals`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_REMEMBERED = 256
_EVERY = 16
# Most options that are kept of one request.
_MOST_OPTIONS = 24
_HALVINGS = 40
_CALM_S = 60.0
# Share of the window after which a price is old: other gateways may have spent meanwhile.
_OLD = 1e-4
# Number of parts of a window by which arrivals are counted.
_PIECES = 32


@dataclass(frozen=True, slots=True)
class BudgetSnapshot:
    """A budget now. Times are seconds of one clock.

    `reserved` is held by open requests, which will spend only a part of it.
    """

    amount: float
    spent: float
    start_s: float
    end_s: float
    reserved: float = 0.0

    @property
    def left(self) -> float:
        """The amount that can still be reserved."""
        return max(0.0, self.amount - self.spent - self.reserved)


class BudgetPacer:
    """Computes the price of one budget from its requests.

    Arrivals are counted by parts of the budget's window, so that a gateway that starts later knows
    since when the others have counted.
    """

    def __init__(self) -> None:
        self.price = 0.0
        self._seen: deque[tuple[Floats, Floats]] = deque(maxlen=_REMEMBERED)
        self._since = 0
        self._window = (math.nan, math.nan)
        self._from_s = self._priced_s = math.nan
        # Requests in this window: this gateway's, the reported ones among them, and those of all
        # gateways by part of the window.
        self._own = 0
        self._reported = 0
        self._shared: Mapping[int, int] = {}
        # Requests per second in the window before.
        self._rate_before = 0.0

    def observe(self, worth: Floats, cost: Floats) -> None:
        """Add the options of one request.

        Args:
            worth: (options,), quality less the price of time; -inf where impossible.
            cost: (options,), expected cost.
        """
        self._own += 1
        self._since += 1
        keep = upper_concave_hull(worth, cost)
        if len(keep):
            self._seen.append((worth[keep], cost[keep]))

    def due(self) -> bool:
        """Whether there are enough new requests to compute the price again."""
        return self._since >= _EVERY or (self._since > 0 and len(self._seen) < _EVERY)

    @property
    def starts_s(self) -> float:
        """Start of the window; NaN before the first one."""
        return self._window[0]

    @property
    def has_requests(self) -> bool:
        """Whether this gateway had a request for the budget in this window."""
        return self._own > 0

    def stale(self, purse: BudgetSnapshot, now_s: float) -> bool:
        """Whether the price is out of date for this state of the budget."""
        window = (purse.start_s, purse.end_s)
        old_s = _OLD * (purse.end_s - purse.start_s)
        return self._since > 0 or window != self._window or now_s - self._priced_s > old_s

    def unreported(self, now_s: float) -> tuple[int, int]:
        """Return the present piece of the window, and the requests since the last call.

        They are to be added to the counts that all gateways share.
        """
        count, self._reported = self._own - self._reported, self._own
        return self._piece(now_s), count

    def set_arrivals(self, arrivals: Mapping[int, int]) -> None:
        """Take over the arrivals at all gateways, this one included, by part of the window."""
        self._shared = arrivals

    def _piece(self, now_s: float) -> int:
        start_s, end_s = self._window
        share = (now_s - start_s) / (end_s - start_s)
        return min(_PIECES - 1, max(0, int(_PIECES * share)))

    def reprice(self, purse: BudgetSnapshot, now_s: float) -> float:
        """Compute the price for the rest of the window, at the rate of its requests so far."""
        self._since = 0
        self._priced_s = now_s
        if (purse.start_s, purse.end_s) != self._window:
            self._begin(purse, now_s)
        if not self._seen:
            return self.price
        coming = self._rate(now_s) * max(purse.end_s - now_s, 0.0)
        left = max(0.0, purse.amount - purse.spent)
        self.price = self.solve(left / max(coming, 1.0))
        return self.price

    def _begin(self, purse: BudgetSnapshot, now_s: float) -> None:
        """Start a window: arrivals start at zero, the remembered options stay the best estimate."""
        first = math.isnan(self._window[0])
        if first:
            self._from_s = max(now_s, purse.start_s)
        else:
            self._rate_before = self._rate(min(now_s, self._window[1]))
            self._from_s = purse.start_s
            self._own = self._reported = 0
        self._window = (purse.start_s, purse.end_s)
        self._shared = {}

    def _rate(self, now_s: float) -> float:
        """Requests per second at all gateways together."""
        start_s, end_s = self._window
        from_s = self._from_s
        if self._shared and (first := min(self._shared)) < self._piece(from_s):
            # Other gateways have counted for longer than this one.
            from_s = start_s + first * (end_s - start_s) / _PIECES
        known = max(self._reported, sum(self._shared.values()))
        # Unreported arrivals are scaled by the same ratio as the reported ones.
        times = known / self._reported if self._reported else 1.0
        arrivals = known + (self._own - self._reported) * times
        # A burst at the start is not a rate: the rate before weighs as much as this time.
        calm_s = min(_CALM_S, (end_s - start_s) / 100)
        return (arrivals + calm_s * self._rate_before) / (max(now_s - from_s, 0.0) + calm_s)

    def solve(self, each: float) -> float:
        """The least λ at which the requests remembered would have spent `each` or less on average.

        It is 0 where they would at price 0, and the greatest useful price where no price suffices.
        """
        if not self._seen:
            return 0.0
        # At price 0 each request takes its best option, which is the last of its hull.
        if sum(float(cost[-1]) for _, cost in self._seen) / len(self._seen) <= each:
            return 0.0
        width = max(len(cost) for _, cost in self._seen)
        worth = np.full((len(self._seen), width), -np.inf)
        cost = np.zeros((len(self._seen), width))
        for row, (w, c) in enumerate(self._seen):
            worth[row, : len(w)], cost[row, : len(c)] = w, c
        rows = np.arange(len(worth))

        def spends(price: float) -> float:
            return float(cost[rows, (worth - price * cost).argmax(axis=1)].mean())

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
    """A price at which every request takes its cheapest option."""
    finite = np.isfinite(worth)
    spread = float(worth[finite].max() - worth[finite].min())
    costs = np.unique(cost[finite])
    gaps = np.diff(costs)
    gaps = gaps[gaps > 1e-9 * max(costs[-1], 1e-300)]
    return (spread + 1e-9) / float(gaps.min()) if len(gaps) else 0.0


def upper_concave_hull(worth: Floats, cost: Floats) -> NDArray[np.intp]:
    """Indices of the options that some price would choose, cheapest first: the upper concave hull.

    At most 24 of them are returned, evenly spaced.
    """
    if len(worth) == 1:
        return np.flatnonzero(np.isfinite(worth))
    order = np.flatnonzero(np.isfinite(worth))
    order = order[np.lexsort((-worth[order], cost[order]))]
    # Drop options that cost more than a better one, which leaves few.
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
