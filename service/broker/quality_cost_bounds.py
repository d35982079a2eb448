"""The bounds of one request: which recipes keep them, and the nearest bounds that one keeps. Pure.

A request may bound the quality from below, cost and time from above, and the experts. The bounds
are hard: a recipe that breaks one can't be selected. The bound of the time excludes recipes that
would be too slow even if their experts were resident and idle. Queues and swaps pass, so they break
no bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from service.broker.pool_state import Floats
from service.broker.recipe_catalog import Ints, RecipeCatalog
from service.broker.recipe_steps import LEAST_RECRUITS, StepFigures, most_cost

_DIGITS = 4


class Exclusion(IntEnum):
    """Why a recipe can't be selected."""

    NONE = 0
    NO_POOL = 1
    CONTEXT = 2
    DEADLINE = 3
    CIRCUIT_OPEN = 4
    # From here on it breaks a bound of the request, whatever the state of the pools.
    MAX_COST = 5
    NOT_ALLOWED = 6
    MIN_QUALITY = 7
    OPEN_TOOL_CALL = 8
    TOO_SLOW = 9


FIRST_BROKEN_BOUND = Exclusion.MAX_COST


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """The bounds of a request.

    Attributes:
        allowed: (experts,), the experts that a recipe may use; None allows all.
        min_quality: Least expected quality.
        max_cost: Most cost if every expert of a recipe is called.
        floor: (experts,), the most that the prompt and one token of answer can cost; None is 0.
            The gateway cuts answers to `max_cost`, but it can't cut the prompt.
        deadline_s: The deadline that the client set; infinite without one.
    """

    allowed: NDArray[np.bool_] | None = None
    min_quality: float = 0.0
    max_cost: float = math.inf
    floor: Floats | None = None
    deadline_s: float = math.inf

    def exclusions(
        self,
        catalog: RecipeCatalog,
        rows: Ints,
        quality: Floats,
        worst: Floats,
        idle_s: Floats | None = None,
    ) -> NDArray[np.int8]:
        """Find the recipes that break a bound.

        Args:
            catalog: The recipes.
            rows: (recipes,), the recipes, as rows of the catalog.
            quality: (recipes,), their expected quality.
            worst: (recipes,), their expected cost if every expert is called.
            idle_s: (recipes,), their expected time if their experts were resident and idle, 0 where
                it is unknown; None takes 0.

        Returns:
            (recipes,), an `Exclusion` for each; 0 for recipes that keep every bound.
        """
        found = np.zeros(len(rows), dtype=np.int8)
        if math.isfinite(self.deadline_s) and idle_s is not None:
            found[idle_s > self.deadline_s] = Exclusion.TOO_SLOW
        if math.isfinite(self.max_cost):
            found[self.least_cost(catalog, rows, worst) > self.max_cost] = Exclusion.MAX_COST
        if self.min_quality > 0:
            found[quality < self.min_quality] = Exclusion.MIN_QUALITY
        if self.allowed is not None:
            found[~self.allows(catalog, rows)] = Exclusion.NOT_ALLOWED
        return found

    def allows(self, catalog: RecipeCatalog, rows: Ints) -> NDArray[np.bool_]:
        """(recipes,), whether the allowed experts suffice for each recipe."""
        if self.allowed is None:
            return np.ones(len(rows), dtype=bool)
        enough = ~(catalog.uses[rows] & ~self.allowed).any(axis=1)
        recruited = (catalog.among[rows] & self.allowed).sum(axis=1) >= LEAST_RECRUITS
        found: NDArray[np.bool_] = enough & (recruited | ~catalog.recruits[rows])
        return found

    def least_cost(self, catalog: RecipeCatalog, rows: Ints, worst: Floats) -> Floats:
        """(recipes,), the least `max_cost` with which each recipe is possible."""
        if self.floor is None:
            return worst
        return np.maximum(worst, catalog.most_calls[rows] @ self.floor)


@dataclass(frozen=True, slots=True)
class NearestBounds:
    """What would be possible instead of bounds that no recipe keeps.

    Attributes:
        min_quality: The greatest `min_quality` that is possible with the other bounds.
        max_cost: The least `max_cost` that is possible with the other bounds.
        deadline_s: The least deadline that is possible with the other bounds.
        together: `min_quality`, `max_cost` and deadline of the best recipe of the allowed experts,
            where it does not suffice to change one of them. None if the experts leave no recipe.
    """

    min_quality: float | None = None
    max_cost: float | None = None
    deadline_s: float | None = None
    together: tuple[float, float, float] | None = None


def worst_costs(
    catalog: RecipeCatalog,
    rows: Ints,
    cost: Floats,
    steps: StepFigures | None = None,
    recruitable: NDArray[np.bool_] | None = None,
) -> Floats:
    """(recipes,), the cost if every expert of a recipe is called; see `recipe_steps.most_cost`."""
    return most_cost(catalog, rows, cost, steps, recruitable)


def nearest_bounds(
    bounds: RequestBounds,
    catalog: RecipeCatalog,
    rows: Ints,
    quality: Floats,
    worst: Floats,
    idle_s: Floats | None = None,
) -> NearestBounds:
    """Find the nearest bounds that some recipe keeps, where no recipe keeps `bounds`.

    Values are rounded to four digits, to the side on which they are possible. The arguments are
    those of `RequestBounds.exclusions`.
    """
    within = bounds.allows(catalog, rows)
    if not within.any():
        return NearestBounds()
    least = bounds.least_cost(catalog, rows, worst)
    time_s = np.zeros(len(rows)) if idle_s is None else idle_s
    cheap = least <= bounds.max_cost
    good = quality >= bounds.min_quality
    quick = time_s <= bounds.deadline_s

    def nearest(figure: Floats, others: NDArray[np.bool_], *, up: bool) -> float | None:
        """The nearest value among the recipes that keep the other bounds."""
        kept = figure[within & others]
        return _rounded(float(kept.min() if up else kept.max()), up=up) if len(kept) else None

    found = NearestBounds(
        nearest(quality, cheap & quick, up=False),
        nearest(least, good & quick, up=True),
        nearest(time_s, good & cheap, up=True),
    )
    if found != NearestBounds():
        return found
    best = np.flatnonzero(within & (quality == quality[within].max()))
    at = best[np.lexsort((time_s[best], least[best]))[0]]
    figures = float(quality[at]), float(least[at]), float(time_s[at])
    return NearestBounds(
        together=(
            _rounded(figures[0], up=False),
            _rounded(figures[1], up=True),
            _rounded(figures[2], up=True),
        )
    )


def _rounded(value: float, *, up: bool) -> float:
    """Round to `_DIGITS` significant digits, up or down."""
    if value <= 0:
        return 0.0
    if up:
        # Where the same cost is added up in another order, it may be a little greater.
        value *= 1 + 1e-9
    unit = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    found = float(f"{value:.{_DIGITS}g}")
    if up and found < value:
        found += unit
    elif not up and found > value:
        found -= unit
    return float(f"{found:.{_DIGITS}g}")
