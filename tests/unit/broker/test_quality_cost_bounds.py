"""A request's bounds: nothing that breaks one is left, and the nearest ones are possible."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.broker.pool_state import PoolStateTable, idle_view
from service.broker.quality_cost_bounds import (
    FIRST_BROKEN_BOUND,
    NearestBounds,
    RequestBounds,
    nearest_bounds,
    worst_costs,
)
from service.broker.recipe_catalog import RecipeCatalog
from service.broker.selection import SelectionRequest, select
from service.types import MAX_LATER, Recipe

EXPERTS = ("a", "b", "c")
BOOK = RecipeCatalog(EXPERTS, (Recipe("vote", ("a", "b", "c")), Recipe("cascade", ("a",), ("c",))))
ROWS = BOOK.everything
POOLS = PoolStateTable(BOOK.index).to_matrix([idle_view(EXPERTS)])

shares = st.floats(0, 1)
costs = st.lists(st.floats(1e-9, 1e3), min_size=3, max_size=3).map(np.array)
qualities = st.lists(shares, min_size=len(ROWS), max_size=len(ROWS)).map(np.array)
request_bounds = st.builds(
    RequestBounds,
    allowed=st.none() | st.lists(st.booleans(), min_size=3, max_size=3).map(np.array),
    min_quality=st.just(0.0) | shares,
    max_cost=st.just(math.inf) | st.floats(0, 2e3),
    floor=st.none() | costs,
)


def keeps(bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray) -> np.ndarray:
    found = bounds.exclusions(BOOK, ROWS, quality, worst_costs(BOOK, ROWS, cost))
    return np.asarray(found == 0)


@settings(deadline=None)
@given(request_bounds, qualities, costs)
def test_select_never_takes_a_recipe_that_breaks_a_bound(
    bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray
) -> None:
    request = SelectionRequest(
        rows=ROWS,
        quality=quality,
        reach=np.full((len(ROWS), MAX_LATER), 0.5) * (BOOK.later[ROWS] < 3),
        tokens=np.full(3, 20.0),
        cost=cost,
        cost_price=0.01,
        bounds=bounds,
    )
    got = select(BOOK, POOLS, request)
    best = got.best()
    assert (best is None) == (not keeps(bounds, quality, cost).any())
    if best is None:
        assert (got.exclusion >= FIRST_BROKEN_BOUND).all()
        assert not np.isfinite(got.ideal).any(), "no pool loads an expert for it"
        return
    recipe = BOOK.recipes[best]
    at = [EXPERTS.index(name) for name in recipe.experts]
    assert quality[best] >= bounds.min_quality
    assert cost[at].sum() <= bounds.max_cost * (1 + 1e-12)
    if bounds.floor is not None:
        assert bounds.floor[at].sum() <= bounds.max_cost * (1 + 1e-12)
    if bounds.allowed is not None:
        assert bounds.allowed[at].all()


@settings(deadline=None)
@given(request_bounds, qualities, costs)
def test_nearest_bounds_are_possible_and_no_nearer_ones_are(
    bounds: RequestBounds, quality: np.ndarray, cost: np.ndarray
) -> None:
    if keeps(bounds, quality, cost).any():
        return
    worst = worst_costs(BOOK, ROWS, cost)
    found = nearest_bounds(bounds, BOOK, ROWS, quality, worst)
    free = replace(bounds, min_quality=0.0, max_cost=math.inf)
    if not keeps(free, quality, cost).any():
        assert found == NearestBounds(None, None, None), "only other experts would do"
        return
    if found.min_quality is not None:
        assert found.min_quality <= bounds.min_quality
        assert keeps(replace(bounds, min_quality=found.min_quality), quality, cost).any()
        nearer = found.min_quality * 1.0011 + 1e-300
        assert not keeps(replace(bounds, min_quality=nearer), quality, cost).any()
    if found.max_cost is not None:
        assert found.max_cost > bounds.max_cost
        assert keeps(replace(bounds, max_cost=found.max_cost), quality, cost).any()
        nearer = found.max_cost / 1.0011
        assert not keeps(replace(bounds, max_cost=nearer), quality, cost).any()
    # One bound suffices, or both are told together.
    assert (found.together is None) == (found.min_quality is not None or found.max_cost is not None)
    if found.together is not None:
        least, most = found.together
        assert keeps(replace(bounds, min_quality=least, max_cost=most), quality, cost).any()


@pytest.mark.parametrize(
    ("bounds", "nearest"),
    [
        # `c` is the best alone, and the vote better; both cost more than 5.
        (RequestBounds(None, 0.75, 5.0), NearestBounds(0.6, 10.0, None)),
        (RequestBounds(None, 0.99, math.inf), NearestBounds(0.9, None, None)),
        (RequestBounds(None, 0.99, 0.5), NearestBounds(None, None, (0.9, 13.0))),
        (
            RequestBounds(np.array([True, True, False]), 0.75, math.inf),
            NearestBounds(0.6, None, None),
        ),
        # A recipe needs all of its experts.
        (RequestBounds(np.zeros(3, dtype=bool), 0.1, 5.0), NearestBounds(None, None, None)),
        (RequestBounds(None, 0.0, 0.5, np.array([7.0, 8.0, 9.0])), NearestBounds(None, 7.0, None)),
    ],
)
def test_nearest_bounds_by_hand(bounds: RequestBounds, nearest: NearestBounds) -> None:
    quality = np.array([0.5, 0.6, 0.8, 0.9, 0.7])
    worst = worst_costs(BOOK, ROWS, np.array([1.0, 2.0, 10.0]))
    found = nearest_bounds(bounds, BOOK, ROWS, quality, worst)
    for name in ("min_quality", "max_cost", "together"):
        expected, got = getattr(nearest, name), getattr(found, name)
        assert got == (None if expected is None else pytest.approx(expected, rel=2e-3)), name
