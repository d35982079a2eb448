"""The reference cost: what the answer to a prompt would cost if quality alone decided. Pure.

Presets price cost relative to it, so that their figures fit tiny and huge experts, and any unit of
cost. A preset that gives up κ of quality to save the whole reference cost c_ref has
λ_cost = κ / c_ref.

The best recipe differs by category, so that the reference is the mean over the categories of the
best recipe's cost. A recipe that is best nowhere has no part in it, however dear it is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def best_shares(quality: Floats, cost: Floats) -> Floats:
    """The share of the categories in which each recipe is the best.

    Args:
        quality: (categories, recipes), expected quality; -inf where a recipe is no candidate.
        cost: (recipes,), cost of a recipe. Of equally good recipes the cheapest is the best.

    Returns:
        (recipes,), shares that add up to 1; zeros without any category or candidate.
    """
    shares = np.zeros(quality.shape[1])
    if not quality.size:
        return shares
    best = quality.max(axis=1, keepdims=True)
    of_best = np.where(quality == best, cost, np.inf)
    at = of_best[np.isfinite(best[:, 0])].argmin(axis=1)
    np.add.at(shares, at, 1.0)
    return shares / max(1, len(at))
